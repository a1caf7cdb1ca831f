"""Decode and store in the blocks of a serving engine, against float64 attention to the stored numbers; needs a GPU."""

import math

import numpy as np
import pytest

from elastickv.backends.bad_token import BadToken
from elastickv.backends.cuda import block_launch
from elastickv.backends.cuda.kernel_selection import blocks_variant
from elastickv.errors import UsageError
from elastickv.recipe import Recipe
from elastickv.recipe.formats import FORMATS
from elastickv.recipe.slab import Slab
from tests.backends.cuda.block_engine import Engine

RECIPES = ("int4", "int8", "fp8", "k=int8,v=int4", "int4,vgroup=32", "k=int8_per_channel,v=int8")
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
    [("bf16", "int8,stride=2", "90"), ("fp32", "int4", "90"), ("bf16", "int4", "75"), ("fp16", "bf16", "90")],
)
def test_what_no_kernel_serves_is_refused(dtype, text, arch):
    with pytest.raises(UsageError, match="serving engine"):
        blocks_variant(128, 4, dtype, Recipe.parse(text), arch)


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
@pytest.mark.parametrize("lengths", [(9000, *range(40, 640, 12)), (*range(40, 640, 12), 9000), (200,) * 70])
def test_long_and_short_requests_share_the_device(engine, lengths):
    """More (request, KV head) pairs than blocks, of which some begin behind a pair's last unit."""
    of = engine(lengths, Recipe.parse("int4"), 128, 4, 4)
    query, output = prefill_then_step(of, lengths)
    assert max(of.errors(query, output, lengths)) < 4e-3


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
def test_the_window_begins_after_its_last_missing_block(engine):
    import torch

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
@pytest.mark.parametrize("blocks", [block_launch._STORE_BLOCKS, 1])
def test_the_blocks_of_a_chunk_are_shared_out_to_many_requests(engine, monkeypatch, blocks):
    monkeypatch.setattr(block_launch, "_STORE_BLOCKS", blocks)
    lengths = [5 + i % 7 for i in range(1100)]
    lengths[0], lengths[33], lengths[700], lengths[1099] = 40, 1000, 65, 200
    of = engine(lengths, Recipe.parse("int4"), 128, 1, 2)
    query, output = prefill_then_step(of, lengths)
    assert max(of.errors(query, output, lengths)) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("starts", [[0, 1, 1, 1], [0, 1, 2, 3]])
def test_rows_of_no_request_store_nothing_and_attend_to_nothing(engine, starts):
    before, after = [299, 199, 99], [300, 200, 100]
    of = engine(after, Recipe.parse("int4"), 128, 2, 4)
    torch = of.torch
    of.store([0] * 3, before)
    rows = of.rows(before, after)
    for each in of.step:
        each[1:] = math.nan
    # Tables and window_first are what earlier requests left there.
    of.first.copy_(torch.tensor([0, 64, 32]))
    lengths = torch.tensor([300, 0, 0], dtype=torch.int32, device="cuda")
    own = int(of.window_table[0, 299 // of.size]) * of.size + 299 % of.size
    inputs = (lengths, torch.tensor(starts, dtype=torch.int32).cuda(), torch.tensor([own, -1, -1]).cuda(), of.bad)
    pages, recent = of.pages.clone(), of.recent.clone()
    of.kernels.store(of.arguments(), rows, *(each.data_ptr() for each in inputs), 3, 1)
    query, output = of.attend(rows, lengths, [1] * len(lengths))
    assert torch.equal(of.pages, pages) and (of.bad == -1).all()
    changed = (of.recent.view(torch.int16) != recent.view(torch.int16)).any(dim=-1).any(dim=1)
    assert changed.nonzero().tolist() == [[own // of.size, own % of.size]]
    assert max(of.errors(query[:1], output[:1], [300])) < 4e-3
    assert (output[1:] == 0).all()


@pytest.mark.gpu
def test_rows_before_the_start_of_a_request_are_nothing(engine):
    of = engine([2, 2], Recipe.parse("int4"), 128, 2, 4)
    torch = of.torch
    of.rows([0, 0], [2, 2])
    order = [0, 1, 4, 5, 2, 3, 6, 7]  # two rows before the start, then the request's own
    of.step = [torch.cat([torch.full_like(each, math.nan), each])[order] for each in of.step]
    rows = of.rows_of_step()
    lengths = torch.tensor([2, 2], dtype=torch.int32, device="cuda")
    blocks = of.window_table[:, :1].long() * of.size
    slots = (blocks + torch.arange(-2, 2, device="cuda")).clamp_min(0) * (torch.arange(4, device="cuda") > 1)
    inputs = (lengths, torch.tensor([0, 4, 8], dtype=torch.int32).cuda(), slots.flatten(), of.bad)
    of.device.follow(torch.cuda.current_stream().cuda_stream)
    of.kernels.store(of.arguments(), rows, *(each.data_ptr() for each in inputs), 2, 4)
    query, output = of.attend(rows, lengths, [4] * len(lengths))
    assert (of.bad == -1).all()
    assert (output[[0, 1, 4, 5]] == 0).all()
    assert max(of.errors(query[[2, 3, 6, 7]], output[[2, 3, 6, 7]], [2, 2], 2)) < 4e-3
    assert of.torch.equal(of.gather(0, [0, 0], [2, 2], [0, 0])[0], torch.cat(of.keys))


@pytest.mark.gpu
def test_a_captured_graph_follows_lengths_and_tables(engine):
    of = engine([700, 300, 40], Recipe.parse("int4"), 128, 2, 4)
    torch = of.torch
    of.store([0, 0, 0], [600, 200, 39])
    # The last row is of no request.
    lengths = torch.tensor([601, 201, 0], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, 1, 2, 2], dtype=torch.int32, device="cuda")
    slots = torch.tensor([0, 0, -1], device="cuda")
    query = of.random(3, 8)
    output = torch.empty_like(query)
    rows = of.rows([600, 200, 39], [601, 201, 40])
    keys, values = of.step
    view = of.view(query)

    def step():
        of.device.follow(torch.cuda.current_stream().cuda_stream)
        of.kernels.store(of.arguments(), rows, lengths.data_ptr(), starts.data_ptr(), slots.data_ptr(), of.bad.data_ptr(), 3, 1)
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
        lengths.copy_(torch.tensor([*(n + 1 for n in now), 0], dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        if number % 30 == 0 or number == 89:
            assert max(of.errors(query[:2], output[:2], [n + 1 for n in now])) < 4e-3
            assert (output[2] == 0).all()


@pytest.mark.gpu
def test_outputs_are_nan_from_a_bad_token_on_and_words_move_to_the_host(engine):
    lengths, before = [300, 200, 1000], [288, 199, 700]
    of = engine(lengths, Recipe.parse("int4"), 128, 2, 4)
    torch = of.torch
    of.store([0] * 3, before)
    of.keys[0][290, 1, 5], of.values[2][700] = math.nan, math.inf
    words, found = torch.full((2, 300), -1, device="cuda"), torch.full((4, 2, 300), -1).pin_memory()
    number = torch.tensor(7, dtype=torch.int32, device="cuda")
    of.bad = words[0]
    of.store(before, lengths)
    # A drafter's words fail no request. What the host has not taken yet stays.
    words[1, 1] = words[1, 299] = BadToken(30, 199, too_large=True).word
    found[3, 0, 2] = BadToken(0, 650, too_large=True).word

    def failed(output):
        addresses = (each.data_ptr() for each in (words, found, number))
        step = (each.data_ptr() for each in of.inputs[:2])
        of.kernels.fail(*addresses, 300, *step, output.data_ptr())
        torch.cuda.synchronize()
        return output

    output = of.random(12 + 1 + 300, 8)
    expected = output.clone()
    expected[2:12], expected[13:] = math.nan, math.nan
    assert torch.equal(failed(output).nan_to_num(-1), expected.nan_to_num(-1))
    assert (words == -1).all()
    assert (found[[0, 1, 2]] == -1).all()
    seen = [{request: BadToken.of(word) for request, word in enumerate(row) if word != -1} for row in found[7 % 4].tolist()]
    of_drafter = BadToken(30, 199, True)
    assert seen == [{0: BadToken(0, 290, False), 2: BadToken(0, 650, True)}, {1: of_drafter, 299: of_drafter}]
    # Without a word nothing changes.
    output = of.random(12 + 1 + 300, 8)
    assert torch.equal(failed(output.clone()), output)
