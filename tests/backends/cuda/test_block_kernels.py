"""Decode and store in the blocks of a serving engine, against float64 attention to the stored numbers; needs a GPU."""

import itertools
import math

import numpy as np
import pytest

from elastickv.backends.cuda.kernel_selection import blocks_variant
from elastickv.errors import UsageError
from elastickv.kvcache.quantize import stored_values
from elastickv.recipe import AttentionShape, Recipe
from elastickv.recipe.formats import FORMATS, PAGE_TOKENS
from elastickv.recipe.slab import Slab

RECIPES = ("int4", "int8", "fp8", "k=int8,v=int4", "int4,vgroup=32")
LENGTHS = (1000, 33, 1, 128, 129, 160, 161, 2049, 31, 32)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("text", RECIPES)
def test_a_slab_holds_what_the_formats_need(text, head_dim):
    recipe = Recipe.parse(text)
    slab = Slab.of(recipe, head_dim)
    key, value = FORMATS[recipe.key_format], FORMATS[recipe.value_format]
    assert slab.key_codes == 32 * head_dim * key.bits // 8
    assert slab.value_codes == 32 * head_dim * value.bits // 8
    parts = (slab.key_codes, slab.key_scales, slab.value_codes, slab.value_scales)
    assert all(part % 16 == 0 for part in parts)
    assert slab.n_bytes == sum(parts) < 32 * head_dim * 2 * 2


def test_the_slab_of_int4_is_the_documented_size():
    assert Slab.of(Recipe.parse("int4"), 128).n_bytes == 4736


@pytest.mark.parametrize(
    ("dtype", "text", "arch"),
    [("bf16", "int4,pages=1/4", "90"), ("fp32", "int4", "90"), ("bf16", "int4", "75"), ("fp16", "bf16", "90")],
)
def test_what_no_kernel_serves_is_refused(dtype, text, arch):
    with pytest.raises(UsageError, match="serving engine"):
        blocks_variant(128, 4, dtype, Recipe.parse(text), arch)


class Engine:
    """Requests whose blocks are scattered, and the plain numbers that were stored in them."""

    def __init__(self, lengths, recipe, head_dim, kv_heads, group, window=128, window_block=8, dtype="bf16", seed=0):
        import torch

        from elastickv.backends.cuda.block_kernels import BlockKernels
        from elastickv.backends.cuda.device import CudaDevice

        self.torch, self.recipe, self.dtype = torch, recipe, dtype
        self.kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        self.dim, self.kv_heads, self.group, self.window, self.size = head_dim, kv_heads, group, window, window_block
        torch.manual_seed(seed)
        self.keys = [self.random(n, kv_heads) for n in lengths]
        self.values = [self.random(n, kv_heads) for n in lengths]
        self.device = CudaDevice(0)
        shape = AttentionShape(4 * len(lengths), kv_heads * group, kv_heads, head_dim)
        self.kernels = BlockKernels(self.device, shape, dtype, recipe, window)
        self.slab = self.kernels.slab.n_bytes
        self.page_table = self.table(lengths, PAGE_TOKENS)
        self.window_table = self.table(lengths, window_block)
        self.pages = torch.zeros(int(self.page_table.max()) + 1, kv_heads, self.slab, dtype=torch.uint8, device="cuda")
        # What no step has written is NaN: reading it shows.
        self.recent = torch.full(
            (int(self.window_table.max()) + 1, kv_heads, window_block, 2 * head_dim), math.nan, dtype=self.kind, device="cuda"
        )
        self.first = torch.zeros(len(lengths), dtype=torch.int32, device="cuda")
        self.bad = torch.full((1,), -1, device="cuda")

    def random(self, *shape):
        return self.torch.randn(*shape, self.dim, device="cuda").to(self.kind)

    def table(self, lengths, size):
        """Blocks in random order; block 0 belongs to nobody."""
        counts = [-(-n // size) for n in lengths]
        order = self.torch.randperm(sum(counts)).int() + 1
        table = self.torch.zeros(len(lengths), max(counts) + 1, dtype=self.torch.int32)
        for row, end, count in zip(table, itertools.accumulate(counts), counts, strict=True):
            row[:count] = order[end - count : end]
        return table.cuda()

    def arguments(self):
        from elastickv.backends.cuda.block_arguments import BlocksArguments

        return BlocksArguments(
            pages=self.pages.data_ptr(),
            window=self.recent.data_ptr(),
            page_table=self.page_table.data_ptr(),
            window_table=self.window_table.data_ptr(),
            page_stride=self.pages.stride(0),
            window_stride=self.recent.stride(0) * 2,
            kv_heads=self.kv_heads,
            slab_bytes=self.slab,
            page_columns=self.page_table.shape[1],
            window_columns=self.window_table.shape[1],
            window_shift=self.size.bit_length() - 1,
        )

    def view(self, tensor):
        from elastickv.kvcache.tensor_view import TensorView

        return TensorView(tensor.data_ptr(), self.dtype, tuple(tensor.shape), tensor.stride())

    def rows(self, before, after):
        from elastickv.backends.cuda.block_arguments import StepRows

        parts = [[each[n:m] for each, n, m in zip(of, before, after, strict=True)] for of in (self.keys, self.values)]
        self.step = [self.torch.cat(each).contiguous() for each in parts]
        return StepRows.of(*map(self.view, self.step))

    def store(self, before, after):
        """Store tokens before[i] to after[i] of each request. Tokens that leave the window in the step get no block."""
        torch = self.torch
        starts = torch.tensor([0, *itertools.accumulate(m - n for n, m in zip(before, after, strict=True))], dtype=torch.int32)
        slots = []
        for i, (n, m) in enumerate(zip(before, after, strict=True)):
            tokens = torch.arange(n, m, device="cuda")
            own = self.window_table[i][tokens // self.size].long() * self.size + tokens % self.size
            slots.append(torch.where(tokens < m - self.window - self.size, tokens % self.size, own))
        self.inputs = (torch.tensor(after, dtype=torch.int32).cuda(), starts.cuda(), torch.cat(slots).cuda(), self.bad)
        self.device.follow(torch.cuda.current_stream().cuda_stream)
        longest = max(m - n for n, m in zip(before, after, strict=True))
        rows = self.rows(before, after)
        self.kernels.store(self.arguments(), rows, *(each.data_ptr() for each in self.inputs), len(after), longest)
        return rows

    def decode(self, before, after):
        """Store and attend with the tokens of a step."""
        rows, counts = self.store(before, after), [m - n for n, m in zip(before, after, strict=True)]
        query = self.random(sum(counts), self.kv_heads * self.group)
        output = self.torch.full_like(query, math.nan)
        lengths, first, starts = self.inputs[0].data_ptr(), self.first.data_ptr(), self.inputs[1].data_ptr()
        uniform = counts[0] if len(set(counts)) == 1 else 0
        owners = self.torch.arange(len(after)).repeat_interleave(self.torch.tensor(counts)).int().cuda()
        which = {"queries_per_request": uniform, "starts": starts, "row_requests": owners.data_ptr()}
        self.kernels.decode(self.arguments(), rows, self.view(query), output.data_ptr(), lengths, first, **which)
        self.torch.cuda.synchronize()
        return query, output

    def gather(self, first_request, first, count, exact):
        """Return keys and values of count[i] tokens from first[i] on of some requests, one after the other."""
        from elastickv.backends.cuda.block_arguments import GatherRows

        torch, ends = self.torch, list(itertools.accumulate(count))
        start = [end - n for end, n in zip(ends, count, strict=True)]
        parts = {"first": first, "count": count, "start": start, "exact_first": exact}
        sent = {name: torch.tensor(numbers, dtype=torch.int32).cuda() for name, numbers in parts.items()}
        rows = GatherRows(**{name: each.data_ptr() for name, each in sent.items()}, first_request=first_request)
        shape = ends[-1], self.kv_heads, self.dim
        keys, values = (torch.full(shape, math.nan, dtype=self.kind, device="cuda") for _ in range(2))
        addresses = keys.data_ptr(), values.data_ptr()
        self.kernels.gather(self.arguments(), rows, *addresses, len(count), max(count))
        torch.cuda.synchronize()
        return keys, values

    def numbers(self, request, cold, value):
        """The keys or values of a request, (tokens, kv_heads, head_dim) float64, of which the first `cold` are in pages."""
        rows, pages = (self.values if value else self.keys)[request], -(-cold // PAGE_TOKENS) * PAGE_TOKENS
        exact = rows.float().cpu().numpy().astype(np.float64)
        fmt = self.recipe.value_format if value else self.recipe.key_format
        for head in range(self.kv_heads if cold else 0):
            whole = rows[:pages, head].float().cpu().numpy()
            exact[:cold, head] = stored_values(whole, fmt, bool(value), self.recipe.v_group(self.dim))[:cold]
        return exact

    def expected(self, request, length, query):
        """Float64 attention of one query, (query heads, head_dim), with `length` tokens."""
        cold = max(length - self.window, int(self.first[request]), 0)
        keys, values = (self.numbers(request, cold, value)[:length] for value in range(2))
        q = query.double().cpu().numpy().reshape(self.kv_heads, self.group, self.dim)
        scores = np.einsum("hgd,khd->hgk", q, keys) / math.sqrt(self.dim)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hgk,khd->hgd", weights / weights.sum(-1, keepdims=True), values).reshape(-1, self.dim)

    def errors(self, query, output, after, count=1):
        """Relative L2 error of every row of a decode."""
        for row, (q, o) in enumerate(zip(query, output, strict=True)):
            request, number = divmod(row, count)
            expected = self.expected(request, after[request] - count + 1 + number, q)
            yield np.linalg.norm(o.double().cpu().numpy() - expected) / np.linalg.norm(expected)


@pytest.fixture
def engine(open_cuda):
    pytest.importorskip("torch")
    return Engine


def prefill_then_step(engine, lengths, count=1):
    """Store all but the last tokens in two chunks, then decode them in one step."""
    before = [n - count for n in lengths]
    half = [n * 5 // 8 for n in before]
    engine.store([0] * len(lengths), half)
    engine.store(half, before)
    return engine.decode(before, list(lengths))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("head_dim", "kv_heads", "group"), [(128, 2, 4), (64, 3, 3), (128, 1, 16), (256, 2, 2), (96, 2, 1)])
@pytest.mark.parametrize("text", RECIPES)
def test_ragged_requests_attend_to_pages_and_the_window(engine, text, head_dim, kv_heads, group, dtype):
    of = engine(LENGTHS, Recipe.parse(text), head_dim, kv_heads, group, dtype=dtype)
    query, output = prefill_then_step(of, LENGTHS)
    assert max(of.errors(query, output, LENGTHS)) < (4e-3 if dtype == "bf16" else 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("window_block", [1, 4, 16, 32])
@pytest.mark.parametrize("window", [32, 100, 128])
def test_any_block_of_the_window(engine, window, window_block):
    of = engine(LENGTHS, Recipe.parse("int4"), 128, 2, 4, window, window_block)
    query, output = prefill_then_step(of, LENGTHS)
    assert max(of.errors(query, output, LENGTHS)) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 3, 4])
def test_several_tokens_a_request_see_their_own_past_only(engine, count):
    lengths = [n + 4 for n in LENGTHS]
    of = engine(lengths, Recipe.parse("int4"), 128, 2, 4)
    query, output = prefill_then_step(of, lengths, count)
    assert max(of.errors(query, output, lengths, count)) < 4e-3


@pytest.mark.gpu
def test_requests_with_different_numbers_of_tokens_decode_in_one_launch(engine):
    counts = (1, 4, 2, 1, 3, 5, 1, 4, 2, 3)
    lengths = [n + 5 for n in LENGTHS]
    of = engine(lengths, Recipe.parse("int4"), 128, 2, 4)
    before = [n - count for n, count in zip(lengths, counts, strict=True)]
    of.store([0] * len(lengths), before)
    query, output = of.decode(before, lengths)
    ends = [n - count + 1 + i for n, count in zip(lengths, counts, strict=True) for i in range(count)]
    owners = [request for request, count in enumerate(counts) for _ in range(count)]
    for q, o, request, end in zip(query, output, owners, ends, strict=True):
        expected = of.expected(request, end, q)
        assert np.linalg.norm(o.double().cpu().numpy() - expected) < 4e-3 * np.linalg.norm(expected)


@pytest.mark.gpu
def test_tokens_without_a_window_block_are_read_from_pages(engine):
    lengths = [300, 200, 1000]
    of = engine(lengths, Recipe.parse("int4"), 128, 2, 4)
    before = [n - 1 for n in lengths]
    of.store([0] * 3, before)
    for request, first in enumerate((288, 192, 0)):
        of.window_table[request, : first // of.size] = 0
        of.first[request] = first
    query, output = of.decode(before, lengths)
    assert max(of.errors(query, output, lengths)) < 4e-3


@pytest.mark.gpu
def test_the_window_begins_after_its_last_missing_block(engine):
    torch = pytest.importorskip("torch")
    lengths, before = [300, 200, 1000, 33, 1], [288, 192, 999, 32, 0]
    of = engine(lengths, Recipe.parse("int4"), 128, 2, 4)
    of.store([0] * 5, before)
    of.store(before, lengths)
    for request, gone in enumerate((280, 170, 0, 1, 0)):  # tokens whose blocks are missing, up to the next block
        of.window_table[request, : -(-gone // of.size)] = 0
    first = torch.full((5,), -1, dtype=torch.int32, device="cuda")
    of.kernels.find_first(of.arguments(), *(each.data_ptr() for each in of.inputs[:2]), first.data_ptr(), 5)
    # 280 is rounded up to a page, 170 to its block's end and then to a page; blocks before the window do not count.
    assert first.tolist() == [288, 192, 0, 32, 0]


@pytest.mark.gpu
def test_a_window_one_token_short_is_noticed(engine):
    """The check of the other tests: attention to one token more from pages is not what they accept."""
    of = engine(LENGTHS, Recipe.parse("int4"), 128, 2, 4)
    query, output = prefill_then_step(of, LENGTHS)
    of.window -= 32
    assert max(of.errors(query, output, LENGTHS)) > 8e-3


@pytest.mark.gpu
def test_steps_of_one_token_complete_pages(engine):
    lengths = [100, 64, 31]
    of = engine([n + 70 for n in lengths], Recipe.parse("k=int8,v=int4"), 128, 2, 4, window=32)
    of.store([0] * 3, lengths)
    for _ in range(70):
        after = [n + 1 for n in lengths]
        query, output = of.decode(lengths, after)
        lengths = after
    assert max(of.errors(query, output, lengths)) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("text", RECIPES)
def test_gathered_tokens_are_those_of_pages_and_exactly_those_of_the_window(engine, text, head_dim, dtype):
    lengths = [1, 200, 333, 161, 40]
    of = engine(lengths, Recipe.parse(text), head_dim, 2, 4, dtype=dtype)
    of.store([0] * 5, lengths)
    # Of requests 1 to 4: a part of each, a part that ends in a page, the window alone, and nothing.
    first, count, exact = [70, 3, 101, 0], [130, 150, 60, 0], [72, 1 << 30, 0, 0]
    gathered = of.gather(1, first, count, exact)
    for value, (read, rows) in enumerate(zip(gathered, (of.keys, of.values), strict=True)):
        row = 0
        for request, (n, m, e) in enumerate(zip(first, count, exact, strict=True), 1):
            expected = of.numbers(request, min(max(n, e), n + m), value)[n : n + m]
            part = read[row : row + m].double().cpu().numpy()
            np.testing.assert_allclose(part, expected[: len(part)], rtol=4e-3 if dtype == "bf16" else 1e-3, atol=1e-6)
            stored = rows[request][max(n, e) : n + m]
            assert of.torch.equal(read[row + m - len(stored) : row + m], stored)
            row += m


@pytest.mark.gpu
def test_a_captured_graph_follows_lengths_and_tables(engine):
    of = engine([700, 300], Recipe.parse("int4"), 128, 2, 4)
    torch = of.torch
    of.store([0, 0], [600, 200])
    lengths = torch.tensor([601, 201], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, 1, 2], dtype=torch.int32, device="cuda")
    slots = torch.zeros(2, dtype=torch.int64, device="cuda")
    query = of.random(2, 8)
    output = torch.empty_like(query)
    rows = of.rows([600, 200], [601, 201])
    keys, values = of.step
    view = of.view(query)

    def step():
        of.device.follow(torch.cuda.current_stream().cuda_stream)
        of.kernels.store(of.arguments(), rows, lengths.data_ptr(), starts.data_ptr(), slots.data_ptr(), of.bad.data_ptr(), 2, 1)
        of.kernels.decode(of.arguments(), rows, view, output.data_ptr(), lengths.data_ptr(), of.first.data_ptr())

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for number in range(90):
        now = [600 + number, 200 + number]
        for request, n in enumerate(now):
            keys[request], values[request] = of.keys[request][n], of.values[request][n]
            slots[request] = of.window_table[request, n // of.size] * of.size + n % of.size
        lengths.copy_(torch.tensor([n + 1 for n in now], dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        if number % 30 == 0 or number == 89:
            assert max(of.errors(query, output, [n + 1 for n in now])) < 4e-3
