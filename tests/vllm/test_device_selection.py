"""What kernels that select pages read of a step's requests: their places, prompts and ratios, found without the host's help."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("cuda.bindings")
import torch

from elastickv.errors import UsageError
from elastickv.recipe import PAGE_TOKENS, Recipe
from elastickv.vllm.selection.device_selection import NEVER, DeviceSelection
from elastickv.vllm.selection.row_writer import RowWriter

REQUESTS, PAGES = 6, 10
RECIPES = {
    0: "int4,pages=1/4:1/2,anchor_every=4",
    1: "int4",
    3: "int4,pages=1/3,anchor_every=2",
    5: "int4,pages=1/8,anchor_every=4",
}


PARSED = {layer: Recipe.parse(text) for layer, text in RECIPES.items()}
HEADS = 4  # of a layer, on all ranks


def shares(layer, ratio):
    recipe = PARSED[layer] if ratio is None else Recipe.parse(f"int4,pages={1 / ratio}")
    return np.array([recipe.fraction(head % 2) for head in range(HEADS)])


@pytest.fixture
def selection():
    of = DeviceSelection(shares, REQUESTS, drafts=3, capacity=PAGES, device="cpu")
    of.layers = {
        layer: of.add_layer(layer, recipe, range(2, 4) if layer == 5 else range(2), layer)
        for layer, recipe in PARSED.items()
        if layer != 1
    }
    of.reserve()
    return of


def batch(request_indices, lengths, prompts, padded=None, prefilling=(), table=None):
    """A step of requests, with rows that pad a graph behind them."""
    count, padded = len(request_indices), padded or len(request_indices)
    rows = torch.zeros(padded, dtype=torch.int32)
    rows[:count] = torch.tensor(lengths)
    blocks = torch.zeros(padded, PAGES, dtype=torch.int32)
    blocks[:count] = torch.tensor(table if table is not None else np.arange(count * PAGES).reshape(count, PAGES) + 1)
    flags = torch.zeros(padded, dtype=torch.bool)
    flags[list(prefilling)] = True
    return SimpleNamespace(
        num_reqs=padded,
        req_idx=np.array(request_indices),
        rswa_prefix_lens=torch.tensor(prompts, dtype=torch.int32),
        is_prefilling=flags,
        seq_lens=rows,
        block_table_tensor=blocks,
    )


def test_layers_share_the_memory_of_equal_sizes(selection):
    assert {place: memory.headers.shape for place, memory in selection._memory.items()} == {
        (2, 2): (2, REQUESTS, 2, 2, 4),  # 3 drafts meet one more anchor where every fourth token is one
        (2, 3): (1, REQUESTS, 3, 2, 4),
    }
    assert [(each.index, each.memory_key) for each in selection.layers.values()] == [(0, (2, 2)), (0, (2, 3)), (1, (2, 2))]
    shapes = {memory.lists.shape[1:] for memory in selection._memory.values()}
    assert shapes == {(REQUESTS, 2, 2, PAGES), (REQUESTS, 3, 2, PAGES)}


def test_requests_of_more_pages_than_lists_can_name_are_refused():
    DeviceSelection(shares, REQUESTS, drafts=0, capacity=2**16, device="cpu")
    with pytest.raises(UsageError, match=r"^decodes of up to 2,097,184 tokens cannot select pages: give .* most 2,097,152, "):
        DeviceSelection(shares, REQUESTS, drafts=0, capacity=2**16 + 1, device="cpu")


def test_each_layer_has_its_own_addresses_and_fractions(selection):
    rows = RowWriter(selection, REQUESTS, torch.device("cpu")).rows
    arguments = {layer: each.arguments(rows) for layer, each in selection.layers.items()}
    assert len({each.headers for each in arguments.values()}) == len({each.fractions for each in arguments.values()}) == 3
    assert arguments[5].headers - arguments[0].headers == REQUESTS * 2 * 2 * 16
    assert arguments[5].page_lists - arguments[0].page_lists == REQUESTS * 2 * 2 * PAGES * 2
    assert (arguments[3].anchor_every, arguments[3].anchor_offset, arguments[3].ring) == (2, 3, 3)
    assert selection._memory[2, 2].fractions[:, 0].tolist() == [[1 / 4, 1 / 2], [1 / 8, 1 / 8]]


def test_rows_are_written_at_addresses_that_stay(selection):
    of = RowWriter(selection, REQUESTS, torch.device("cpu"))
    where = [each.data_ptr() for each in (of.rows.request_indices, of.rows.prompts, of.rows.ratio_numbers)]
    rows = of.write(batch([4, 0, 3], [100, 50, 70], [90, 50, 69], padded=5), {})
    assert rows.request_indices[:3].tolist() == [4, 0, 3]
    assert rows.prompts[:5].tolist() == [90, 50, 69, NEVER, NEVER]
    assert [each.data_ptr() for each in (rows.request_indices, rows.prompts, rows.ratio_numbers)] == where


@pytest.mark.parametrize("missing", ["req_idx", "rswa_prefix_lens"])
def test_nothing_is_selected_while_a_graph_is_captured(selection, missing):
    of, step = RowWriter(selection, REQUESTS, torch.device("cpu")), batch([4, 0], [100, 50], [90, 50])
    of.write(step, {})
    setattr(step, missing, None)
    assert of.write(step, {}).prompts[:2].tolist() == [NEVER, NEVER]


def test_requests_that_begin_or_come_back_forget_the_lists_of_their_place(selection):
    of = RowWriter(selection, REQUESTS, torch.device("cpu"))
    for memory in selection._memory.values():
        memory.headers[:] = 7
    of.write(batch([4, 0, 3], [100, 50, 70], [90, 60, 80], padded=4, prefilling=(1, 2)), {})
    for memory in selection._memory.values():
        forgotten = (memory.headers == -1).all(dim=(0, 2, 3, 4))
        assert forgotten.tolist() == [True, False, False, True, False, False]
        assert (memory.headers[:, 4] == 7).all()


def test_a_request_is_known_by_the_block_of_its_newest_page(selection):
    of, blocks = RowWriter(selection, REQUESTS, torch.device("cpu")), np.arange(3 * PAGES).reshape(3, PAGES) + 1
    step = batch([4, 0, 3], [PAGE_TOKENS + 1, PAGE_TOKENS, 0], [9, 9, 9], padded=4, table=blocks)
    rows = of.write(step, {2: 4.0, 11: 2.0, 99: 3.0})  # the second page of the first, the first of the second, and of neither
    numbers = [selection.number_of(ratio, {}) for ratio in (4.0, 2.0)]
    assert rows.ratio_numbers[:4].tolist() == [*numbers, 0, 0]
    assert selection._memory[2, 2].fractions[:, numbers].tolist() == [[[1 / 4] * 2, [1 / 2] * 2]] * 2
    # Blocks beyond those with a ratio, and later steps without any.
    step.block_table_tensor += 1000
    assert of.write(step, {2: 4.0}).ratio_numbers[:4].tolist() == [0] * 4
    step.block_table_tensor -= 1000
    assert of.write(step, {2: 4.0}).ratio_numbers[:4].tolist() == [numbers[0], 0, 0, 0]
    assert of.write(step, {}).ratio_numbers[:4].tolist() == [0] * 4


def test_numbers_of_ratios_are_taken_again_once_all_are(selection):
    first = [selection.number_of(1 + n, {}) for n in range(REQUESTS)]
    assert sorted(first) == list(range(1, REQUESTS + 1))
    running = {n: 1.0 + n for n in range(2)}
    fresh = selection.number_of(100.0, running)
    assert fresh not in (selection.number_of(ratio, running) for ratio in running.values())
    assert selection._memory[2, 2].fractions[0, fresh].tolist() == [1 / 100, 1 / 100]
