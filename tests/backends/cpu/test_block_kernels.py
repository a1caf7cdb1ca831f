"""Decode, store and gather in a serving engine's blocks, against float64 attention to the stored numbers."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickv.backends.cpu.blocks import open_block_kernels
from elastickv.backends.cpu.blocks.host_blocks import HostBlocks
from elastickv.errors import UsageError
from elastickv.kvcache.quantize import stored_values
from elastickv.kvcache.rounding import from_bf16_bits, rounded, to_bf16_bits
from elastickv.recipe import HEAD_DIMS, AttentionShape, Recipe
from elastickv.recipe.formats import FORMATS, PAGE_TOKENS

RECIPES = ("int4", "int8", "fp8", "k=int8,v=int4", "int4,vgroup=32", "bf16")
LENGTHS = (1000, 33, 1, 128, 129, 160, 161, 2049, 31, 32)
LIMITS = {"fp32": 4e-4, "bf16": 4e-3, "fp16": 1e-3}
KINDS = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}


def as_rows(numbers, dtype):
    """Return float32 numbers as an engine's tensor holds them: bits of bfloat16 as uint16."""
    return to_bf16_bits(numbers) if dtype == "bf16" else numbers.astype(KINDS[dtype])


def numbers(rows):
    return from_bf16_bits(rows) if rows.dtype == np.uint16 else rows.astype(np.float32)


def nothing(shape, dtype):
    """What no step has written is NaN: reading it shows."""
    return as_rows(np.full(shape, np.nan, np.float32), dtype)


class Engine:
    """Requests whose blocks are scattered, and the plain numbers that were stored in them."""

    def __init__(self, lengths, text, head_dim=128, kv_heads=2, group=4, window=128, window_block=8, dtype="bf16", seed=0):
        self.random = np.random.default_rng(seed)
        self.recipe, self.dtype, self.window, self.size = Recipe.parse(text), dtype, window, window_block
        self.dim, self.kv_heads, self.group = head_dim, kv_heads, group
        self.keys, self.values = ([self.rows(n, kv_heads) for n in lengths] for _ in range(2))
        shape = AttentionShape(1, kv_heads * group, kv_heads, head_dim)
        self.kernels = open_block_kernels(shape, dtype, self.recipe, window)
        self.page_table, self.window_table = self.table(lengths, PAGE_TOKENS), self.table(lengths, window_block)
        self.pages = np.full((self.page_table.max() + 1, kv_heads, self.kernels.slab_bytes), 0xFF, np.uint8)
        self.recent = nothing((self.window_table.max() + 1, kv_heads, window_block, 2 * head_dim), dtype)
        self.first = np.zeros(len(lengths), np.int32)

    def rows(self, *shape):
        return as_rows(self.random.standard_normal((*shape, self.dim), np.float32), self.dtype)

    def table(self, lengths, size):
        """Blocks in random order; block 0 belongs to nobody."""
        counts = [-(-n // size) for n in lengths]
        order = self.random.permutation(sum(counts)).astype(np.int32) + 1
        table = np.zeros((len(lengths), max(counts) + 1), np.int32)
        for row, end, count in zip(table, itertools.accumulate(counts), counts, strict=True):
            row[:count] = order[end - count : end]
        return table

    def blocks(self, requests=slice(None)):
        return HostBlocks.of(self.pages, self.recent, self.page_table[requests], self.window_table[requests])

    def step(self, before, after, requests):
        """Return the arguments of a step of some requests: keys, values, lengths and starts."""
        spans = list(zip(requests, before, after, strict=True))
        rows = [np.concatenate([of[i][n:m] for i, n, m in spans]) for of in (self.keys, self.values)]
        # As an engine's projection leaves them: behind each other in wider rows.
        joined = np.concatenate(rows, axis=1)
        rows = [joined[:, : self.kv_heads], joined[:, self.kv_heads :]]
        starts = np.array([0, *itertools.accumulate(m - n for n, m in zip(before, after, strict=True))], np.int32)
        return *rows, np.array(after, np.int32), starts

    def store(self, before, after, requests=None):
        """Store tokens before[i] to after[i] of each request. Tokens that leave the window in the step get no block."""
        requests = list(range(len(before)) if requests is None else requests)
        arguments, slots = self.step(before, after, requests), []
        for i, n, m in zip(requests, before, after, strict=True):
            tokens = np.arange(n, m)
            own = self.window_table[i, tokens // self.size].astype(np.int64) * self.size + tokens % self.size
            slots.append(np.where(tokens < m - self.window - self.size, tokens % self.size, own))
        self.kernels.store(self.blocks(requests), *arguments, np.concatenate(slots))
        return arguments

    def attend(self, query, arguments, requests):
        output = nothing(query.shape, self.dtype)
        keys, values, lengths, starts = arguments
        first = np.ascontiguousarray(self.first[requests])
        scale = 1 / math.sqrt(self.dim)
        self.kernels.decode(self.blocks(requests), keys, values, query, output, lengths, starts, first, scale)
        return output

    def decode(self, before, after):
        """Store and attend with the tokens of a step."""
        arguments = self.store(before, after)
        query = self.rows(len(arguments[0]), self.kv_heads * self.group)
        return query, self.attend(query, arguments, list(range(len(before))))

    def stored(self, request, value, tokens):
        """Return the numbers of a request's first `tokens` tokens in pages, (tokens, kv_heads, head_dim)."""
        fmt = self.recipe.value_format if value else self.recipe.key_format
        rows = numbers((self.values if value else self.keys)[request][: -(-tokens // PAGE_TOKENS) * PAGE_TOKENS])
        if FORMATS[fmt].is_float:
            return rounded(rows[:tokens], fmt).astype(np.float64)
        of_heads = [stored_values(rows[:, head], fmt, value, self.recipe.v_group(self.dim)) for head in range(self.kv_heads)]
        return np.stack(of_heads, axis=1)[:tokens]

    def expected(self, request, length, query):
        """Float64 attention of one query, (query heads, head_dim), with `length` tokens."""
        cold = max(length - self.window, int(self.first[request]), 0)
        keys, values = (numbers(of[request][:length]).astype(np.float64) for of in (self.keys, self.values))
        if cold:
            keys[:cold], values[:cold] = (self.stored(request, value, cold) for value in (False, True))
        q = numbers(query).astype(np.float64).reshape(self.kv_heads, self.group, self.dim)
        scores = np.einsum("hgd,khd->hgk", q, keys) / math.sqrt(self.dim)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hgk,khd->hgd", weights / weights.sum(-1, keepdims=True), values).reshape(-1, self.dim)

    def errors(self, query, output, before, after):
        """Relative L2 error of every row of a decode."""
        positions = [(i, position) for i, span in enumerate(zip(before, after, strict=True)) for position in range(*span)]
        for (request, position), q, o in zip(positions, query, output, strict=True):
            expected = self.expected(request, position + 1, q)
            yield np.linalg.norm(numbers(o) - expected) / np.linalg.norm(expected)


def error_of_a_step(of, lengths, count=1):
    """Store all but the last tokens in two chunks, then decode them in one step; return the largest error."""
    before = [n - count for n in lengths]
    half = [n * 5 // 8 for n in before]
    of.store([0] * len(lengths), half)
    of.store(half, before)
    query, output = of.decode(before, lengths)
    return max(of.errors(query, output, before, lengths))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("head_dim", "kv_heads", "group"), [(128, 2, 4), (64, 3, 3), (128, 1, 16), (256, 2, 2), (80, 2, 1)])
@pytest.mark.parametrize("text", RECIPES)
def test_ragged_requests_attend_to_pages_and_the_window(text, head_dim, kv_heads, group, dtype):
    if head_dim % 32 and "vgroup" in text:
        pytest.skip("the group does not divide the head")
    of = Engine(LENGTHS, text, head_dim, kv_heads, group, dtype=dtype)
    assert error_of_a_step(of, LENGTHS) < LIMITS[dtype]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_size_of_a_head_is_supported(head_dim):
    of = Engine([300, 129], "k=int8,v=int4", head_dim, 2, 4)
    assert error_of_a_step(of, [300, 129]) < LIMITS["bf16"]


@pytest.mark.parametrize("window_block", [1, 4, 16, 32])
@pytest.mark.parametrize("window", [32, 100, 128])
def test_any_block_of_the_window(window, window_block):
    of = Engine(LENGTHS, "int4", window=window, window_block=window_block)
    assert error_of_a_step(of, LENGTHS) < LIMITS["bf16"]


@pytest.mark.parametrize("count", [2, 10, 300])
def test_several_tokens_of_a_request_see_their_own_past_only(count):
    lengths = [n + count for n in LENGTHS]
    of = Engine(lengths, "int4", dtype="fp32")
    assert error_of_a_step(of, lengths, count) < LIMITS["fp32"]


def test_requests_bring_different_numbers_of_tokens():
    before, after = [500, 0, 77, 1023], [501, 130, 87, 1024]
    of = Engine(after, "int4", dtype="fp32")
    of.store([0, 0, 0, 0], before)
    assert max(of.errors(*of.decode(before, after), before, after)) < LIMITS["fp32"]


def test_tokens_without_a_window_block_are_read_from_pages():
    lengths = [300, 200, 1000]
    of = Engine(lengths, "int4")
    before = [n - 1 for n in lengths]
    of.store([0] * 3, before)
    for request, first in enumerate((288, 192, 0)):
        of.window_table[request, : first // of.size] = 0
        of.first[request] = first
    assert max(of.errors(*of.decode(before, lengths), before, lengths)) < LIMITS["bf16"]


def test_a_window_one_token_short_is_noticed():
    """The check of the other tests: attention to more tokens from pages is not what they accept."""
    of = Engine(LENGTHS, "int4")
    before = [n - 1 for n in LENGTHS]
    of.store([0] * len(LENGTHS), before)
    query, output = of.decode(before, LENGTHS)
    of.window -= 1
    assert max(of.errors(query, output, before, LENGTHS)) > 2 * LIMITS["bf16"]


def test_steps_of_one_token_complete_pages():
    lengths = [100, 64, 31]
    of = Engine([n + 70 for n in lengths], "k=int8,v=int4", window=32)
    of.store([0] * 3, lengths)
    for _ in range(70):
        after = [n + 1 for n in lengths]
        before, (query, output) = lengths, of.decode(lengths, after)
        lengths = after
    assert max(of.errors(query, output, before, lengths)) < LIMITS["bf16"]


def test_a_page_that_rejected_drafts_completed_is_written_again():
    of = Engine([200], "int4", dtype="fp32")
    true_keys, true_values = of.keys[0].copy(), of.values[0].copy()
    of.store([0], [60])
    of.keys[0][61:66], of.values[0][61:66] = of.rows(5, 2), of.rows(5, 2)
    of.decode([60], [66])
    of.keys[0], of.values[0] = true_keys, true_values
    of.decode([61], [190])
    assert max(of.errors(*of.decode([190], [200]), [190], [200])) < LIMITS["fp32"]


def test_tokens_of_the_null_block_are_not_stored():
    of = Engine([40], "int4")
    keys, values, lengths, starts = of.step([0], [31], [0])
    of.kernels.store(of.blocks(), keys, values, lengths, starts, np.arange(-1, 30) % of.size)
    assert np.isnan(numbers(of.recent)).all() and (of.pages == 0xFF).all()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("text", RECIPES)
def test_pages_and_windows_are_gathered_as_rows(text, dtype):
    of = Engine([200, 300, 64], text, dtype=dtype)
    of.store([0, 0, 0], [200, 300, 64])
    requests, first, count = [1, 0, 2], [33, 160, 64], [200, 31, 0]
    for exact in (False, True):
        if exact:
            first = [172, 169, 64]  # older ones have left the window
            count = [128, 31, 0]
        keys, values = (nothing((sum(count), 2, 128), dtype) for _ in range(2))
        of.kernels.gather(of.blocks(), requests, first, count, exact, keys, values)
        for rows, value in ((keys, False), (values, True)):
            ends = list(itertools.accumulate(count))
            for i, n, m, end in zip(requests, first, count, ends, strict=True):
                own = (of.values if value else of.keys)[i][n : n + m]
                if exact:
                    np.testing.assert_array_equal(rows[end - m : end], own)
                else:
                    expected = of.stored(i, value, 288 if i == 1 else 192)[n : n + m]
                    np.testing.assert_allclose(numbers(rows[end - m : end]), expected, rtol=4e-3, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_batches_of_any_lengths_are_the_requests_one_by_one(data):
    text, dtype = data.draw(st.sampled_from(("int4", "int8", "k=int8,v=int4"))), data.draw(st.sampled_from(("fp32", "bf16")))
    after = data.draw(st.lists(st.integers(1, 700), min_size=1, max_size=5))
    before = [max(0, n - data.draw(st.sampled_from((1, 2, 5, 40)))) for n in after]
    window, size = data.draw(st.sampled_from((32, 61, 128))), data.draw(st.sampled_from((1, 8, 32)))
    of = Engine(after, text, 64, 2, 3, window, size, dtype, seed=data.draw(st.integers(0, 1000)))
    of.store([0] * len(after), before)
    for request, n in enumerate(before):
        first = PAGE_TOKENS * data.draw(st.integers(0, n // PAGE_TOKENS))
        of.first[request] = first
        lost = max(first, n - window - size) // size if first else 0
        of.window_table[request, :lost] = 0
    query, output = of.decode(before, after)
    assert max(of.errors(query, output, before, after)) < LIMITS[dtype]
    for i, (n, m) in enumerate(zip(before, after, strict=True)):
        arguments = of.step([n], [m], [i])
        start = sum(after[:i]) - sum(before[:i])
        alone = of.attend(query[start : start + m - n], arguments, [i])
        np.testing.assert_array_equal(alone, output[start : start + m - n])


@pytest.mark.parametrize(
    ("text", "dtype", "said"),
    [
        ("dense", "bf16", "formats only"),
        ("int4,pages=1/4", "bf16", "formats only"),
        ("int8,stride=2", "bf16", "formats only"),
        ("int4", "int4", "unknown"),
    ],
)
def test_what_no_kernel_serves_is_refused(text, dtype, said):
    with pytest.raises(UsageError, match=said):
        open_block_kernels(AttentionShape(1, 8, 2, 128), dtype, Recipe.parse(text), 128)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("text", ["int4", "int8", "fp8", "k=int8,v=int4", "bf16"])
def test_a_slab_holds_what_the_formats_need(text, head_dim):
    recipe = Recipe.parse(text)
    n_bytes = open_block_kernels(AttentionShape(1, 2, 2, head_dim), "bf16", recipe, 128).slab_bytes
    codes = sum(32 * head_dim * FORMATS[fmt].bits // 8 for fmt in (recipe.key_format, recipe.value_format))
    assert n_bytes % 32 == 0 and codes <= n_bytes <= 32 * head_dim * 2 * 2 + 64


def test_the_slab_of_int4_is_the_documented_size():
    assert open_block_kernels(AttentionShape(1, 2, 2, 128), "bf16", Recipe.parse("int4"), 128).slab_bytes == 4736
