"""Lists of pages follow their requests: through drafts, chunks, moves, prefix hits and blocks that others take over."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.backends.cpu.blocks.host_blocks import EVERY_PAGE, NO_ROW, AnchorField, RowField
from elastickv.errors import UsageError
from elastickv.recipe import PAGE_TOKENS, Recipe
from elastickv.vllm.selection.decode_selection import DecodeSelection, Requests
from elastickv.vllm.selection.page_lists import PageLists
from elastickv.vllm.selection.request_ratios import RequestRatios, _deliver, ratios_of_step

HEADS, WINDOW, DRAFTS = 2, 64, 3


def selection(every, offset=0, drafts=DRAFTS, requests=4):
    recipe = Recipe.parse(f"int4,pages=1/4:1/2,anchor_every={every},sinks=0,window={WINDOW}")
    return DecodeSelection(recipe, lambda ratio: np.array([1 / 2, 1]), range(HEADS), offset, drafts, requests)


def step(of, blocks, spans, prompts, ratios=None):
    """Compute the tokens of a step, a span for each request; return what each row reads of each head, None for every page.

    A list that an anchor at position t chooses is told by its numbers: t, then others.
    """
    starts = np.cumsum([0, *(end - first for first, end in spans)]).astype(np.int32)
    lengths = np.array([end for _, end in spans], np.int32)
    requests = Requests(lengths, starts, np.array(prompts, np.int64), np.array(blocks, np.int32), ratios or {})
    plan = of.plan(requests)
    if plan is None:
        return [None] * int(starts[-1])
    for anchor in plan.anchors:
        request, row = anchor[[AnchorField.REQUEST, AnchorField.ROW]]
        position = lengths[request] - starts[request + 1] + row
        for head, count in enumerate(anchor[len(AnchorField) :]):
            target = anchor[AnchorField.TARGET] + head * anchor[AnchorField.HEAD_BYTES]
            (ctypes.c_int32 * count).from_address(int(target))[:] = [int(position) + i for i in range(count)]
    if len(plan.anchors):
        of.keep(requests, plan)
    return [None if row[RowField.LIST] == EVERY_PAGE else [numbers(row, head) for head in range(HEADS)] for row in plan.rows]


def numbers(row, head):
    """Return a head's list of pages."""
    where = int(row[RowField.LIST] + head * row[RowField.HEAD_BYTES])
    return list((ctypes.c_int32 * row[len(RowField) + head]).from_address(where))


def expected(position, prompt, every, offset, fractions=(1 / 4, 1 / 2)):
    """Return what a token reads by the rule, as `step` says it."""
    own = position - prompt
    anchor = position - min(max(own, 0), (own + offset) % every)
    pages = max(0, anchor + 1 - WINDOW) // PAGE_TOKENS
    counts = [min(pages, max(1, int(fraction * pages))) for fraction in fractions]
    if own < 0 or all(count == pages for count in counts):
        return None
    return [[anchor + i for i in range(count)] for count in counts]


@given(
    every=st.integers(1, 9),
    offset=st.integers(0, 8),
    prompt=st.integers(1, 200),
    steps=st.lists(st.tuples(st.integers(1, 1 + DRAFTS), st.integers(1, 1 + DRAFTS)), min_size=1, max_size=60),
    chunk=st.integers(1, 300),
)
def test_what_a_token_reads_depends_on_its_position_alone(every, offset, prompt, steps, chunk):
    offset %= every
    of, table = selection(every, offset), [np.random.default_rng(0).permutation(40)]
    first = 0
    while first < prompt:
        end = min(prompt, first + chunk)
        assert step(of, table, [(first, end)], [prompt]) == [None] * (end - first)
        first = end
    for rows, accepted in steps:
        reads = step(of, table, [(first, first + rows)], [prompt])
        assert reads == [expected(first + i, prompt, every, offset) for i in range(rows)]
        first += min(rows, accepted)
    # Preempted, and computed again in chunks, of which one has both prompt and answer.
    of, again = selection(every, offset), list[object]()
    for begin in range(0, first, chunk):
        again += step(of, table, [(begin, min(first, begin + chunk))], [prompt])
    assert again == [expected(position, prompt, every, offset) for position in range(first)]


def test_requests_move_in_the_batch_and_skip_steps():
    of, tables = selection(8), np.arange(60).reshape(3, 20)
    lengths = [300, 200, 250]
    step(of, tables, [(0, n) for n in lengths], lengths)
    for order in ([2, 0, 1], [1], [0, 2], [1, 2, 0], [2, 1]):
        reads = step(of, tables[order], [(lengths[i], lengths[i] + 1) for i in order], [(300, 200, 250)[i] for i in order])
        assert reads == [expected(lengths[i], (300, 200, 250)[i], 8, 0) for i in order]
        for i in order:
            lengths[i] += 1


def test_a_list_is_not_read_by_who_gets_its_block_for_other_tokens():
    of, table = selection(8), [range(20)]
    step(of, table, [(0, 300)], [300])
    step(of, table, [(300, 301)], [300])
    step(of, table, [(0, 305)], [305])  # another prompt is stored in the block
    assert step(of, table, [(301, 302)], [300]) == [None]


def test_a_prefix_hit_on_an_answer_has_the_answers_list():
    of, table = selection(8, drafts=0), [range(20)]
    step(of, table, [(0, 310)], [310])
    for position in range(310, 321):
        step(of, table, [(position, position + 1)], [310])
    # Preempted, it comes back with the 320 tokens whose blocks are full: the anchor at 318 is among them.
    assert step(of, table, [(320, 322)], [310]) == [expected(position, 310, 8, 0) for position in (320, 321)]


def test_lists_of_another_ratio_are_not_read():
    of, table = selection(8), [range(20)]
    step(of, table, [(0, 300)], [300])
    larger = (1 / 2, 1)
    assert step(of, table, [(300, 301)], [300], {0: 2.0}) == [expected(300, 300, 8, 0, larger)]
    assert step(of, table, [(301, 302)], [300], {0: 2.0}) == [expected(301, 300, 8, 0, larger)]
    assert step(of, table, [(302, 303)], [300]) == [None]


def test_lists_of_ended_requests_are_forgotten_first():
    lists, counts = PageLists(2), np.array([1])
    for block in (1, 2):
        lists.keep(block, 0, counts, np.zeros((1, 1), np.int32))
    assert lists.find(1, 0, counts) is not None
    lists.keep(3, 0, counts, np.zeros((1, 1), np.int32))
    assert lists.find(2, 0, counts) is None and lists.find(1, 0, counts) is not None


def test_rows_before_the_first_list_may_be_left_to_others():
    of, table = selection(4), [range(20)]
    requests = Requests(np.array([300], np.int32), np.array([0, 300], np.int32), np.array([290]), np.array(table, np.int32), {})
    plan = of.plan(requests)
    assert plan.skip_every_page() == 290
    assert (plan.rows[:290, RowField.LIST] == NO_ROW).all() and (plan.rows[290:, RowField.LIST] > 0).all()


class Asking:
    """A request with these arguments."""

    def __init__(self, **extra_args):
        self.request_id, self.sampling_params = "name", type("Params", (), {"extra_args": extra_args})()


@pytest.mark.parametrize("ratio", [0.9, 8.5, "4", True, [], float("nan")])
def test_a_ratio_of_a_request_is_from_1_to_the_servers(ratio):
    ratios = RequestRatios({"elastickv": {"compress": 8}})
    for accepted in (1, 4.5, 8):
        ratios.add(Asking(elastickv_compress=accepted))
    with pytest.raises(UsageError, match=r"^elastickv_compress=.* is out of range: give a number from 1, every page, to 8$"):
        ratios.add(Asking(elastickv_compress=ratio))


@pytest.mark.parametrize("config", [{}, {"elastickv": {"format": "int4"}}])
def test_a_server_that_selects_no_pages_reads_them_all(config):
    ratios = RequestRatios(config)
    ratios.add(Asking())
    ratios.add(Asking(elastickv_compress=1))
    with pytest.raises(UsageError, match="this server selects no pages: leave it out"):
        ratios.add(Asking(elastickv_compress=2))


def of_step(ratios, prompt, blocks, size=PAGE_TOKENS):
    """Return what a step brings of one request, of so many tokens of a prompt and in these blocks."""
    kinds = [type("Spec", (), {"block_size": n, "sliding_window": w})() for n, w in ((8, 64), (size, None))]
    groups = [type("Group", (), {"kv_cache_spec": kind})() for kind in kinds]
    output = type("Output", (), {"num_scheduled_tokens": {"name": 1}})()
    request = type("Request", (), {"num_prompt_tokens": prompt})()
    ratios.attach(output, {"name": request}, groups, lambda name: ([], blocks))
    try:
        return dict(ratios_of_step())
    finally:
        _deliver({})


@pytest.mark.parametrize("drafts", [0, 3, 40])
def test_a_step_brings_the_blocks_that_may_hold_the_newest_token(drafts):
    """Not all of them: an answer has thousands."""
    ratios = RequestRatios({"elastickv": {"compress": 8}}, drafts)
    ratios.add(Asking(elastickv_compress=2))
    brought = of_step(ratios, 100, list(range(1000, 1500)))
    # Lookahead and two steps in flight with all drafts rejected, from a token in any place of its block.
    assert set(range(1500 - 1 - -(-3 * (1 + drafts) // PAGE_TOKENS), 1500)) <= brought.keys()
    assert len(brought) <= 3 + 4 * (1 + drafts) // PAGE_TOKENS
    # None of its prompt's, which others may share, but the last.
    assert of_step(ratios, 100, list(range(1000, 1004))).keys() == {1003}
    assert of_step(ratios, 100, list(range(1000, 1003)), size=2 * PAGE_TOKENS).keys() == set(range(2002, 2006))


def test_a_ratio_is_known_by_its_blocks_in_all_groups_of_the_models_pages():
    """vLLM divides layers into groups of equally many: each has blocks of its own, and layers of each look for theirs."""

    def group(tokens, window=None):
        return SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=tokens, sliding_window=window))

    groups = [group(16, 64), group(64), group(64), group(96)]  # a stock window, two of the model's pages, a drafter's
    blocks = {"name": [[1, 2], [3, 4, 5], [6, 7, 8], [9, 10]], "other": [[11], [12], [13], [14]]}
    requests = {name: SimpleNamespace(num_prompt_tokens=100) for name in blocks}
    output = SimpleNamespace(num_scheduled_tokens=dict.fromkeys(blocks, 1))
    ratios = RequestRatios({"elastickv": {"compress": 8}})
    ratios.add(Asking(elastickv_compress=2))
    try:
        ratios.attach(output, requests, groups, blocks.__getitem__)
        # From the page of the prompt's last token on, in pages of 32 tokens.
        assert ratios_of_step() == dict.fromkeys([8, 9, 10, 11, 14, 15, 16, 17], 2.0)
    finally:
        ratios.attach(output, {}, groups, blocks.__getitem__)
    assert ratios_of_step() == {}
