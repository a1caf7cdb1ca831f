"""What is launched over the blocks of a serving engine, and what the word of a token that cannot be stored says; no GPU."""

from importlib import resources

import pytest

pytest.importorskip("cuda.bindings.nvrtc")
from elastickv.backends.bad_token import NO_BAD_TOKEN, REPORTED_STEPS, BadToken
from elastickv.backends.cuda.block_arguments import BlocksArguments, GatherRows, PageListArguments, StepRows
from elastickv.backends.cuda.block_kernels import BlockKernels
from elastickv.backends.cuda.kernel_selection import ONE_BLOCK_PAGES
from elastickv.kvcache.tensor_view import TensorView
from elastickv.recipe import AttentionShape, Recipe
from tests.backends.cuda.recording_device import RecordingDevice

STEP = StepRows(keys=1 << 20, values=2 << 20, key_stride=1024, value_stride=2048)
ROWS = GatherRows(first=1, count=2, start=3, exact_first=4, first_request=5)


@pytest.fixture
def kernels():
    return BlockKernels(RecordingDevice(), AttentionShape(64, 32, 8, 128), "bf16", Recipe.parse("int4"), 128)


def blocks(kv_heads=8):
    sizes = {"page_stride": 8 * 4736, "window_stride": 32768, "slab_bytes": 4736, "page_columns": 9, "window_columns": 33}
    tables = {"pages": 10, "window": 11, "page_table": 12, "window_table": 13}
    return BlocksArguments(**tables, **sizes, kv_heads=kv_heads, window_shift=3)


def stored(kernels, requests, longest, kv_heads=8):
    kernels.store(blocks(kv_heads), STEP, 21, 22, 23, 24, requests, longest)
    return kernels._device.take()[-1]


def gathered(kernels, requests, longest):
    kernels.gather(blocks(), ROWS, 31, 32, requests, longest)
    return kernels._device.take()[-1]


def test_a_step_of_few_tokens_has_one_block_per_request_and_head_of_keys_or_values(kernels):
    for longest in (1, 4, 32):
        assert stored(kernels, 64, longest).grid == (1, 16, 64)


def test_a_chunk_has_a_block_for_every_page_that_it_can_touch_up_to_a_limit(kernels):
    assert stored(kernels, 1, 33).grid == (3, 16, 1)
    assert stored(kernels, 1, 8192).grid == (258, 16, 1)
    assert stored(kernels, 3, 64).grid == (12, 16, 1)
    assert stored(kernels, 1000, 8192).grid == (512, 16, 1)
    assert stored(kernels, 1000, 8192, kv_heads=10000).grid == (2, 20000, 1)  # one would be a step of few tokens


def test_a_store_passes_its_requests_their_words_and_the_layer(kernels):
    values = stored(kernels, 7, 40).values
    expected = {
        "lengths": 21,
        "starts": 22,
        "slot_mapping": 23,
        "bad": 24,
        "requests": 7,
        "layer": 0,
        "value_stride": 2048,
        "pages": 10,
    }
    assert values.items() >= expected.items()


def test_failing_requests_is_one_block_for_all_layers(kernels):
    kernels.fail(1, 2, 6, 7, 3, 4, 5)
    recorded = kernels._device.take()[-1]
    expected = {"words": 1, "reported": 2, "step": 6, "requests": 7}
    expected |= {"lengths": 3, "starts": 4, "output": 5, "width": 32 * 128}
    assert (recorded.kernel, recorded.grid) == ("fail_requests", (1,))
    assert recorded.values == expected


def test_a_gather_is_one_launch_of_limited_size(kernels):
    recorded = gathered(kernels, 4, 129)
    expected = {"keys": 31, "values": 32, "first": 1, "count": 2, "start": 3, "exact_first": 4, "first_request": 5}
    assert recorded.values.items() >= expected.items()
    assert recorded.grid == (8, 6, 4)  # a part of a page at either end
    assert gathered(kernels, 1, 65536).grid == (8, 1024, 1)
    assert gathered(kernels, 2000, 65536).grid == (8, 1, 2000)


def test_nothing_is_launched_to_gather_nothing(kernels):
    for requests, longest in ((0, 10), (3, 0)):
        kernels.gather(blocks(), ROWS, 31, 32, requests, longest)
    assert not kernels._device.take()


def test_kernel_and_host_keep_the_reports_of_as_many_steps_apart():
    """The host allocates the memory that the kernel writes to."""
    source = resources.files("elastickv.backends.cuda").joinpath("kernels", "store_blocks.cu").read_text(encoding="utf-8")
    assert f"#define REPORTED_STEPS {REPORTED_STEPS} " in source


def test_a_word_names_layer_and_position():
    assert BadToken.of(NO_BAD_TOKEN) is None
    assert BadToken.of(70000 << 31 | 3 << 1) == BadToken(3, 70000, False)
    assert BadToken.of(0) == BadToken(0, 0, False)
    assert BadToken.of(5 << 31 | 1023 << 1 | 1) == BadToken(1023, 5, True)


@pytest.mark.parametrize("after_store", [False, True])
def test_a_decode_starts_behind_the_store_only_where_it_reads_what_that_stores(kernels, after_store):
    query = TensorView(1 << 22, "bf16", (4, 32, 128), (4096, 128, 1))
    kernels.decode(blocks(), STEP, query, 41, 21, 42, after_store=after_store)
    stored(kernels, 4, 1)
    kernels.decode(blocks(), STEP, query, 41, 21, 42, after_store=after_store)
    assert [(each.kernel, each.in_order) for each in kernels._device.take()] == [("decode_blocks", after_store)]
    assert not kernels._device.ordered


LISTS = PageListArguments(
    request_indices=51,
    prompts=52,
    ratio_numbers=53,
    fractions=54,
    headers=55,
    page_lists=56,
    anchor_every=4,
    anchor_offset=1,
    ring=2,
    list_capacity=4096,
)


def selecting(rows, capacity=4096, device=None):
    shape = AttentionShape(rows, 32, 8, 128)
    return BlockKernels(device or RecordingDevice(), shape, "bf16", Recipe.parse("int4,pages=1"), 128, capacity)


@pytest.mark.parametrize("after_store", [False, True])
def test_a_decode_of_listed_pages_selects_them_first(after_store):
    kernels = selecting(64)
    query = TensorView(1 << 22, "bf16", (4, 32, 128), (4096, 128, 1))
    kernels.decode(blocks(), STEP, query, 41, 21, 42, lists=LISTS, after_store=after_store)
    select, decode = kernels._device.take()
    assert (select.kernel, decode.kernel) == ("select_blocks", "decode_blocks")
    assert (select.in_order, decode.in_order) == (after_store, after_store)
    assert select.values["listings"] == decode.values["listings"] is not None
    assert decode.values.items() >= {"page_lists": 56, "list_capacity": 4096, "rows": 4}.items()
    assert select.values.items() >= {"headers": 55, "page_lists": 56, "anchor_every": 4, "ring": 2, "lengths": 21}.items()


def test_heads_of_few_rows_are_scored_by_several_blocks_each_and_of_many_by_one():
    kernels, parts = selecting(256), {}
    for rows in (1, 4, 24, 25, 256):
        query = TensorView(1 << 22, "bf16", (rows, 32, 128), (4096, 128, 1))
        kernels.decode(blocks(), STEP, query, 41, 21, 42, lists=LISTS)
        select = kernels._device.take()[0]
        parts[rows] = select.values["parts"]
        assert select.grid == (rows * 8 * parts[rows],)
    assert parts == {1: 49, 4: 12, 24: 2, 25: 1, 256: 1}


def test_scores_have_room_where_they_are_exchanged():
    """One block keeps the scores of a head in its shared memory, unless there are too many."""
    assert selecting(256)._scratch.size.scores == 24 * 8 * 4096 * 4
    assert selecting(4)._scratch.size.scores == 4 * 8 * 4096 * 4
    assert selecting(256, ONE_BLOCK_PAGES + 1)._scratch.size.scores == 256 * 8 * (ONE_BLOCK_PAGES + 1) * 4
    assert (
        BlockKernels(
            RecordingDevice(), AttentionShape(256, 32, 8, 128), "bf16", Recipe.parse("int4"), 128, 4096
        )._scratch.size.scores
        == 0
    )


def test_kernel_and_host_agree_how_many_scores_one_block_keeps():
    source = resources.files("elastickv.backends.cuda").joinpath("kernels", "best_pages.cuh").read_text(encoding="utf-8")
    assert f"#define SHARED_SCORES {ONE_BLOCK_PAGES} " in source
