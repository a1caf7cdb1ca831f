"""The bytes that decodes read: those that recipes count, wherever the window ends where a page does."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.recipe import PAGE_TOKENS, AttentionShape, Recipe, read_ratio, step_bytes
from elastickv.transformers.budget import Budget
from elastickv.vllm.layer_formats import ServedModel, at_ratio, selection_line
from elastickv.vllm.metrics.decode_reads import SERVERS_RATIO, DecodeReads, ReadTotals
from elastickv.vllm.selection.ratio_shares import RatioShares
from elastickv.vllm.serving_options import PAGE_FORMATS, page_recipe

SHAPE, WINDOW, LONGEST = AttentionShape(1, 8, 4, 64), 128, 40_000
SELECTING = {
    layer: Recipe.parse(f"{text},sinks=0,window={WINDOW}")
    for layer, text in enumerate(
        (
            "int4,pages=1/8:1/4:1/16:1/3,anchor_every=4",
            "k=int8_per_channel,v=int8,pages=1/9",
            "int4,vgroup=32,pages=1/7,anchor_every=3",
            "k=int8_per_channel,v=int4,pages=1/5,anchor_every=16",
            "int2,pages=1/2",
            "int8",
        )
    )
}


def reads(recipes=SELECTING, shape=SHAPE):
    of_ratio = RatioShares(recipes, ServedModel(shape, len(recipes), LONGEST))
    return DecodeReads(recipes, shape, len(recipes), LONGEST, lambda ratio: of_ratio.of_layers(list(recipes), ratio))


def of(counted, positions, prompts, since=0, ratio=None):
    positions, prompts = np.atleast_1d(positions).astype(np.int64), np.atleast_1d(prompts).astype(np.int64)
    ratios = np.broadcast_to(SERVERS_RATIO if ratio is None else ratio, len(positions))
    return counted.totals(positions, prompts, np.full(len(positions), since), ratios)


def ages(position, prompt, recipes=SELECTING):
    return {
        layer: recipe.steps_since_refresh(position - prompt, recipe.layer_anchor_offset(layer, len(recipes)))
        for layer, recipe in recipes.items()
    }


def by_recipe(position, prompt, recipes=SELECTING):
    """Return the bytes that the recipes count for one token."""
    since = ages(position, prompt, recipes)
    return sum(step_bytes(recipe, [position + 1], SHAPE, "bf16", since[layer]).kv for layer, recipe in recipes.items())


@given(pages=st.integers(20, 1000), own=st.integers(0, 300))
def test_a_token_reads_what_its_recipes_count(pages, own):
    """From 20 pages on, all layers that select leave some out."""
    position = WINDOW + pages * PAGE_TOKENS - 1
    found = of(reads(), position, position - own)
    assert found.read_bytes == by_recipe(position, position - own)
    assert found.dense_bytes == len(SELECTING) * (position + 1) * SHAPE.kv_heads * SHAPE.head_dim * 4
    selects = [since for layer, since in ages(position, position - own).items() if SELECTING[layer].selection == "pages"]
    assert found.anchors == selects.count(0)
    assert (found.tokens, found.layer_tokens, found.steps) == (1, len(SELECTING), 0)


@pytest.mark.parametrize("name", PAGE_FORMATS)
def test_formats_without_a_selection_read_what_their_recipes_count(name):
    """But for the scale of a page of fp8, which is padded where pages are not contiguous."""
    recipes, position = {0: page_recipe(name, WINDOW), 1: page_recipe(name, WINDOW)}, WINDOW + 500 * PAGE_TOKENS - 1
    found, counted = of(reads(recipes), position, position).read_bytes, by_recipe(position, position, recipes)
    assert found == counted if name != "fp8" else counted < found < 1.01 * counted


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_mean_over_an_interval_is_the_ratio_that_the_log_and_an_evaluation_say(dtype):
    """Tokens of one context at every distance from their anchors. An element of a window is 2 bytes to all three."""
    position = 32768 - 1
    own = 1000 + np.arange(48)  # a multiple of all `anchor_every`
    found = of(reads(), np.full(len(own), position), position - own)
    budget = Budget(SELECTING, SHAPE, dtype, None, position + 1, fixed=False)
    assert found.dense_bytes / found.read_bytes == pytest.approx(budget.ratio_at(position + 1, 1.0), rel=1e-12)
    model = ServedModel(SHAPE, len(SELECTING), position + 1, dtype)
    assert f"1/{found.dense_bytes / found.read_bytes:.2f} of" in selection_line(SELECTING, model)
    alone = {0: SELECTING[0]}
    found = of(reads(alone), np.full(4, position), position - own[:4])
    assert found.dense_bytes / found.read_bytes == pytest.approx(read_ratio(alone[0], [position + 1], SHAPE))


def test_an_answer_reads_what_an_evaluation_counts_up_to_the_page_at_the_end_of_the_window():
    prompt, tokens = 20_000, 8 * PAGE_TOKENS
    positions = np.arange(prompt, prompt + tokens)
    found = of(reads(), positions, np.full(tokens, prompt)).read_bytes
    assert found == pytest.approx(sum(by_recipe(int(position), prompt) for position in positions), rel=0.01)


def test_the_page_that_the_window_has_begun_to_leave_is_read_as_a_whole():
    recipes, position = {0: page_recipe("int4", WINDOW)}, WINDOW + 10 * PAGE_TOKENS - 1
    page = 2 * PAGE_TOKENS * 32 + 64 * 4 + PAGE_TOKENS * 4
    at_boundary, one_more, last = (
        of(reads(recipes), each, each).read_bytes for each in (position, position + 1, position + PAGE_TOKENS)
    )
    assert one_more - at_boundary == last - at_boundary == SHAPE.kv_heads * page
    short = of(reads(recipes), WINDOW - 1, 10)
    assert short.read_bytes == short.dense_bytes


def test_a_list_of_all_pages_is_none():
    """With a page or two there is nothing to select: neither are pages ranked nor is a list read."""
    every = {layer: replace(recipe, selection="all", fractions=(), anchor_every=1) for layer, recipe in SELECTING.items()}
    for pages in (0, 1):
        position = WINDOW + pages * PAGE_TOKENS - 1
        found = of(reads(), position, position)
        assert (found.read_bytes, found.anchors) == (of(reads(every), position, position).read_bytes, 0)


def test_a_list_that_is_gone_is_read_as_every_page_until_the_next_anchor():
    recipes = {0: SELECTING[0]}
    position, prompt = 20_000, 20_000 - 101  # its anchor is the token before
    listed, gone = (of(reads(recipes), position, prompt, since) for since in (position - 1, position))
    anchor = of(reads(recipes), position, prompt + 1)
    every = of(reads({0: page_recipe("int4", WINDOW)}), position, prompt)
    assert listed.read_bytes < anchor.read_bytes < gone.read_bytes == every.read_bytes
    assert (listed.anchors, gone.anchors, anchor.anchors) == (0, 0, 1)


def test_a_ratio_of_a_request_reads_more_and_1_every_page():
    position = WINDOW + 1000 * PAGE_TOKENS - 1
    own = 1000 + np.arange(48)
    positions, prompts = np.full(len(own), position), position - own
    usual, larger, one = (of(reads(), positions, prompts, ratio=ratio) for ratio in (None, 3.5, 1))
    assert usual.read_bytes < larger.read_bytes < one.read_bytes
    assert larger == of(reads(at_ratio(SELECTING, 3.5, ServedModel(SHAPE, len(SELECTING), LONGEST))), positions, prompts)
    assert 3.5 <= larger.dense_bytes / larger.read_bytes < 3.6
    assert (one.anchors, one.tokens) == (0, len(own))


def test_requests_of_one_step_each_read_by_their_own_ratio():
    """More of them than are counted at a time."""
    rng, counted = np.random.default_rng(1), reads()
    prompts = rng.integers(1, 30_000, 600)
    positions, ratios = (
        prompts + rng.integers(0, 500, 600),
        rng.choice([SERVERS_RATIO, 1, 2, 3, *np.linspace(3.1, 3.9, 9)], 600),
    )
    single = [of(counted, *each) for each in zip(positions, prompts, np.zeros(600, int), ratios, strict=True)]
    of_server = of(counted, positions, prompts)
    together = of(counted, positions, prompts, ratio=ratios)
    assert together == sum(single, ReadTotals())
    assert of_server.read_bytes < together.read_bytes < of(counted, positions, prompts, ratio=1).read_bytes


def test_tokens_add_up():
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 30_000, 40)
    positions = prompts + rng.integers(0, 500, 40)
    single = [of(reads(), position, prompt) for position, prompt in zip(positions, prompts, strict=True)]
    assert of(reads(), positions, prompts) == sum(single, ReadTotals())
