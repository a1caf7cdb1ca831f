"""The solver keeps the budget, loses as little as it can, and says from which context a budget holds."""

import itertools
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.errors import UsageError
from elastickv.recipe import (
    HEAD_DIMS,
    AttentionShape,
    Recipe,
    explanation,
    for_ratio,
    largest_ratio_scoring_every_step,
    predicted_loss,
    read_ratio,
    solver,
)
from elastickv.recipe.formats import value_groups
from elastickv.recipe.shape import MAX_CONTEXT
from elastickv.recipe.solver import ALIKE, candidates, fraction_of, solve_fraction
from tests.helpers.cases import tried

SHAPE = AttentionShape(1, 32, 8, 128)
shapes = st.builds(
    lambda batch, group, kv, dim: AttentionShape(batch, kv * group, kv, dim),
    st.sampled_from([1, 7]),
    st.sampled_from([1, 4, 7]),
    st.sampled_from([1, 8]),
    st.sampled_from(HEAD_DIMS),
)
contexts = st.integers(1, 1 << 20) | st.integers(100, 5000)
dtypes = st.sampled_from(["fp32", "fp16", "bf16"])


def solved(ratio, context, shape, dtype="bf16", **fixed):
    try:
        return for_ratio(ratio, context, shape, dtype, **fixed)
    except UsageError:
        return None


@tried(60)
@given(st.floats(1, 128), contexts, shapes, dtypes)
def test_what_is_solved_meets_the_ratio_and_its_shape(ratio, context, shape, dtype):
    recipe = solved(ratio, context, shape, dtype)
    if recipe is None or ratio == 1:
        return
    assert read_ratio(recipe, [context], shape, dtype) >= ratio
    assert read_ratio(recipe, [context] * shape.batch, shape, dtype) >= ratio
    recipe.check_shape(shape.head_dim, shape.kv_heads)
    assert Recipe.parse(str(recipe)) == recipe
    assert solved(ratio, context, shape, dtype) == recipe


@tried(30)
@given(st.lists(st.floats(1, 40), min_size=2, max_size=5), contexts, shapes, dtypes)
def test_a_larger_ratio_never_loses_less_and_never_holds_where_a_smaller_one_does_not(ratios, context, shape, dtype):
    recipes = [solved(ratio, context, shape, dtype) for ratio in sorted(ratios)]
    reached = [recipe for recipe in recipes if recipe is not None]
    assert recipes[: len(reached)] == reached
    losses = [predicted_loss(recipe, shape.head_dim) for recipe in reached]
    assert all(more >= less / ALIKE - 1e-12 for less, more in itertools.pairwise(losses))


@tried(15)
@given(st.floats(1.5, 20), st.integers(300, 3000), shapes)
def test_no_recipe_that_meets_the_ratio_loses_less(ratio, context, shape):
    """Every format, every group, every schedule, every number of pages: by trying them all."""
    chosen = solved(ratio, context, shape)
    met = [
        recipe
        for values in (("int8", 0), ("fp8", 0), *(("int4", group) for group in value_groups(shape.head_dim)))
        for recipe in every_recipe(*values, pages=max(0, context - 132) // 32)
        if read_ratio(recipe, [context], shape) >= ratio
    ]
    if chosen is None:
        assert not met
    else:
        least = min(predicted_loss(r, shape.head_dim) for r in met)
        assert predicted_loss(chosen, shape.head_dim) <= ALIKE * least + 1e-12


def every_recipe(value, group, pages):
    yield from (Recipe(key, value, group) for key in ("int8", "fp8", "int4"))
    for count in range(1, pages + 1):
        fraction = fraction_of(count, pages)
        for anchor_every in (1, 2, 4, 8, 16):
            yield Recipe("int4", value, group, selection="pages", fractions=(fraction,), anchor_every=anchor_every)


def test_bits_first_then_pages():
    assert Recipe.for_ratio(8, 32768, SHAPE) == for_ratio(8, 32768, SHAPE) == Recipe.for_ratio(8, 32768)
    assert Recipe.for_ratio(8, 32768, anchor_every=2, window=64).window == 64
    assert for_ratio(1, 32768, SHAPE).is_dense
    assert for_ratio(1.9, 32768, SHAPE) == Recipe.parse("int8")
    assert for_ratio(3, 32768, SHAPE).formats == "int4" and for_ratio(3, 32768, SHAPE).selection == "all"
    assert for_ratio(8, 32768, SHAPE).selection == "pages"
    assert not any(recipe.selection == "stride" for recipe in candidates(SHAPE, 4, 128))


def test_what_is_left_of_the_budget_goes_to_finer_scales():
    assert for_ratio(2.9, 4096, SHAPE).value_group == 32


@pytest.mark.parametrize("context", [4096, 32768, 131072, 1 << 20])
@pytest.mark.parametrize("ratio", [4, 8])
def test_a_budget_is_used_to_the_page(ratio, context):
    recipe = for_ratio(ratio, context, SHAPE)
    pages = (context - 132) // 32
    count = int(recipe.fractions[0] * pages)
    one_more = Recipe(
        recipe.key_format,
        recipe.value_format,
        recipe.value_group,
        "pages",
        anchor_every=recipe.anchor_every,
        fractions=(fraction_of(count + 1, pages),),
    )
    assert read_ratio(one_more, [context], SHAPE) < ratio <= read_ratio(recipe, [context], SHAPE)


@given(st.integers(1, 40_000).flatmap(lambda pages: st.tuples(st.integers(1, pages), st.just(pages))))
def test_a_fraction_of_few_digits_reads_just_so_many_pages(case):
    count, pages = case
    fraction = fraction_of(count, pages)
    assert 0 < fraction <= 1
    assert max(1, int(fraction * pages)) == count


@pytest.mark.parametrize("shape", [SHAPE, AttentionShape(1, 3, 3, 80), AttentionShape(1, 16, 16, 64)])
@pytest.mark.parametrize(("sinks", "window"), [(4, 128), (0, 0), (64, 500)])
@pytest.mark.parametrize("ratio", [2, 3.3, 8, 40])
def test_a_refusal_names_the_context_from_which_the_ratio_holds(shape, sinks, window, ratio):
    regions = {"sinks": sinks, "window": window}
    with pytest.raises(UsageError) as refusal:
        for_ratio(ratio, 20, shape, **regions)
    start = int(re.search(r"from a context of (\d+)", str(refusal.value))[1])
    assert solved(ratio, start - 1, shape, **regions) is None
    for context in (*range(start, start + 200), *range(start + 200, start + 20_000, 487)):
        assert any(read_ratio(recipe, [context], shape) >= ratio for recipe in fewest_bytes(regions))
    assert solved(ratio, start, shape, **regions) is not None


def fewest_bytes(regions):
    whole = Recipe("int4", "int4", **regions)
    one_page = replace(whole, selection="pages", fractions=(1e-9,))
    return [*(replace(one_page, anchor_every=anchor_every) for anchor_every in (16, 8, 4, 2, 1)), whole]


def test_a_ratio_that_no_context_meets_is_refused_as_such():
    with pytest.raises(UsageError, match="no context up to 1048576"):
        for_ratio(1000, 4096, SHAPE)
    with pytest.raises(UsageError, match="no context up to 1048576"):
        for_ratio(33, 4096, SHAPE, anchor_every=1)


def test_one_token_is_a_context_and_none_is_not():
    assert for_ratio(1, 1, SHAPE).is_dense
    with pytest.raises(UsageError, match="a context of 0 tokens is out of range: give a whole number from 1 to 1048576"):
        for_ratio(1, 0, SHAPE)


def test_one_scale_for_the_whole_head_is_written_as_no_group():
    assert {recipe.value_group for recipe in candidates(SHAPE, 4, 128)} == {0, 32, 64}


def test_a_ratio_that_holds_only_beyond_the_largest_context_is_refused_as_such():
    regions = {"sinks": 4, "window": 128}
    # Of the tokens from page to page the last reads the most bytes a token; here the second one beyond the largest context.
    beyond = max(n for n in range(MAX_CONTEXT, MAX_CONTEXT + 64) if (n + 1 - 4 - 128) % 32 == 0)
    ratio = max(read_ratio(recipe, [beyond], SHAPE) for recipe in fewest_bytes(regions))
    with pytest.raises(UsageError, match="no context up to 1048576"):
        for_ratio(ratio, 4096, SHAPE, **regions)


@pytest.mark.parametrize("context", [1000, 4096, 131072])
@pytest.mark.parametrize("shape", [SHAPE, AttentionShape(2, 4, 2, 80)])
def test_the_largest_ratio_of_scoring_every_step_is_reached_and_not_exceeded(context, shape):
    most = largest_ratio_scoring_every_step(context, shape)
    recipe = for_ratio(most, context, shape, anchor_every=1)
    assert recipe.anchor_every == 1
    assert solved(most * 1.001, context, shape, anchor_every=1) is None
    # K's scales are 4 bytes a channel and 32 tokens, of 4 bytes a channel and token.
    assert most < 32


def test_the_refusal_says_what_scoring_every_step_allows():
    most = largest_ratio_scoring_every_step(4096, SHAPE)
    with pytest.raises(UsageError, match=f"{most:.2f} with the pages scored every step"):
        for_ratio(60, 4096, SHAPE)


def test_the_explanation_names_ratio_and_loss():
    recipe = for_ratio(8, 32768, SHAPE)
    text = explanation(recipe, 32768, SHAPE)
    assert f"1/{read_ratio(recipe, [32768], SHAPE):.2f}" in text
    assert f"expected loss {predicted_loss(recipe, 128):.3f}" in text
    assert f"{largest_ratio_scoring_every_step(32768, SHAPE):.2f}" in text


def test_anchors_can_be_fixed():
    for anchor_every in (1, 3, 100):
        assert for_ratio(8, 32768, SHAPE, anchor_every=anchor_every).anchor_every == anchor_every


def test_a_recipe_without_pages_is_solved_as_it_is_or_not_at_all():
    int8 = Recipe.parse("int8")
    assert solve_fraction(int8, 1.9, 32768, SHAPE, "bf16") == int8
    assert solve_fraction(int8, 2, 32768, SHAPE, "bf16") is None


@pytest.mark.parametrize("ratio", [0, 0.99, -1, float("nan"), float("inf"), 1e9])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(UsageError, match="out of range"):
        for_ratio(ratio, 4096, SHAPE)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_at_one_everything_stays_in_the_models_own_dtype(dtype):
    assert for_ratio(1, 4096, SHAPE, dtype).is_dense


def test_of_recipes_that_lose_alike_the_one_that_selects_least_often_is_chosen():
    chosen = for_ratio(8, 131072, SHAPE)
    rarer = [r for r in (2, 4, 8, 16) if r > chosen.anchor_every]
    oftener = for_ratio(8, 131072, SHAPE, anchor_every=chosen.anchor_every // 2)
    assert predicted_loss(chosen, 128) <= ALIKE * predicted_loss(oftener, 128)
    assert all(
        predicted_loss(for_ratio(8, 131072, SHAPE, anchor_every=r), 128) > predicted_loss(oftener, 128) * ALIKE for r in rarer
    )


def test_the_explanation_of_a_recipe_that_was_never_measured_tells_no_loss():
    recipe = Recipe.parse("bf16,reuse,anchor_every=4,decay=0.9")
    assert predicted_loss(recipe, 128) is None
    ratio = read_ratio(recipe, [4096], SHAPE, "fp16")
    assert explanation(recipe, 4096, SHAPE, "fp16") == f"{recipe} reads 1/{ratio:.2f} of the dense bytes at 4096 tokens"


def test_each_input_is_solved_once(monkeypatch):
    inputs = []
    monkeypatch.setattr(solver, "solve_fraction", lambda *each: inputs.append(each) or solve_fraction(*each))
    first = [for_ratio(ratio, 98765, SHAPE) for ratio in (3.01, 3.02)]
    assert len(inputs) == len(set(inputs)) > 0
    count = len(inputs)
    assert [for_ratio(ratio, 98765, SHAPE) for ratio in (3.01, 3.02)] == first
    assert len(inputs) == count


@pytest.mark.parametrize("key", ["int3", "int2"])
def test_key_formats_that_nobody_ranked_are_refused_instead_of_chosen(key):
    shape = AttentionShape(1, 32, 8, 128)
    assert for_ratio(1.5, 32768, shape, key_formats=("int8", "int4")).key_format == "int8"
    with pytest.raises(UsageError, match=f"^keys in {key} have no predicted loss to be ranked by: choose key formats of int8"):
        for_ratio(1.5, 32768, shape, key_formats=("int8", "int4", key))
