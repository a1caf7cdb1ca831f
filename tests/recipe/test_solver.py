"""The solver keeps the budget, loses as little as it can, and says from which context a budget holds."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickv.errors import UsageError
from elastickv.recipe import HEAD_DIMS, AttentionShape, Recipe, for_ratio, read_ratio, resolve
from elastickv.recipe.solver import candidates

SHAPE = AttentionShape(1, 16, 16, 64)


@settings(max_examples=60, deadline=None)
@given(st.floats(1, 16), st.integers(1, 40_000), st.sampled_from(HEAD_DIMS))
def test_a_solved_recipe_meets_the_ratio_and_no_better_one_does(ratio, context, dim):
    shape = AttentionShape(1, 8, 2, dim)
    try:
        chosen = for_ratio(ratio, context, shape)
    except UsageError:
        assert all(read_ratio(r, [context], shape) < ratio for r in candidates("bf16", 4, 128))
        return
    assert read_ratio(chosen, [context], shape) >= ratio
    for better in candidates("bf16", 4, 128):
        if better == chosen:
            break
        assert read_ratio(better, [context], shape) < ratio


def test_bits_first_then_stride():
    assert for_ratio(1, 4096, SHAPE).is_dense
    assert for_ratio(1.8, 4096, SHAPE) == Recipe.parse("int8")
    assert for_ratio(4, 4096, SHAPE).selection == "stride"


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_a_refusal_names_the_context_from_which_the_ratio_holds(ratio):
    with pytest.raises(UsageError) as refusal:
        for_ratio(ratio, 150, SHAPE)
    start = int(re.search(r"from a context of (\d+)", str(refusal.value))[1])
    for context in range(start, start + 64):
        assert read_ratio(for_ratio(ratio, context, SHAPE), [context], SHAPE) >= ratio
    with pytest.raises(UsageError):
        for_ratio(ratio, start - 1, SHAPE)


def test_a_named_stride_takes_the_least_step_that_meets_the_ratio():
    recipe = resolve("stride", 4, 4096, SHAPE)
    assert recipe.key_format == "bf16"
    assert read_ratio(recipe, [4096], SHAPE) >= 4
    assert read_ratio(Recipe("bf16", "bf16", selection="stride", stride=recipe.stride - 1), [4096], SHAPE) < 4


def test_the_original_schedule_anchors_every_compress_steps():
    assert resolve("reuse,decay=0.95,sinks=0,window=0", 4, 4096, SHAPE).anchor_every == 4


def test_overrides_win_over_the_text():
    recipe = resolve("int8,window=64", 1, 4096, SHAPE, sinks=8, window=32)
    assert (recipe.sinks, recipe.window) == (8, 32)


@pytest.mark.parametrize("ratio", [0, 0.99, -1, float("nan"), float("inf"), 1e9])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(UsageError, match="out of range"):
        for_ratio(ratio, 4096, SHAPE)
    with pytest.raises(UsageError, match="out of range"):
        resolve("int8", ratio, 4096, SHAPE)


def test_fp16_models_keep_fp16():
    assert resolve("stride", 2, 4096, SHAPE, "fp16").key_format == "fp16"


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_at_one_everything_stays_in_the_models_own_dtype(dtype):
    assert for_ratio(1, 4096, SHAPE, dtype).is_dense
