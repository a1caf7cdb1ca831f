"""What a user wrote becomes a recipe; one number may be left to the budget."""

import pytest

from elastickv.errors import UsageError
from elastickv.recipe import AttentionShape, Recipe, for_ratio, read_ratio, resolve

SHAPE = AttentionShape(1, 16, 16, 64)


def test_auto_is_the_solver_with_what_is_fixed():
    assert resolve("auto", 4, 4096, SHAPE) == for_ratio(4, 4096, SHAPE)
    fixed = {"anchor_every": 2, "sinks": 8, "window": 64}
    assert resolve(" auto ", 6, 4096, SHAPE, **fixed) == for_ratio(6, 4096, SHAPE, **fixed)
    recipe = resolve("auto", 6, 4096, SHAPE, **fixed)
    assert (recipe.anchor_every, recipe.sinks, recipe.window) == (2, 8, 64)
    assert resolve("auto", 1.5, 4096, SHAPE, anchor_every=2).selection == "all"


def test_a_named_stride_takes_the_least_step_that_meets_the_ratio():
    recipe = resolve("stride", 4, 4096, SHAPE)
    assert recipe.key_format == "bf16"
    assert read_ratio(recipe, [4096], SHAPE) >= 4
    assert read_ratio(Recipe("bf16", "bf16", selection="stride", stride=recipe.stride - 1), [4096], SHAPE) < 4


@pytest.mark.parametrize("text", ["pages", "k=int4,v=int8,pages", "int4,vgroup=32,pages,anchor_every=5,sinks=0,window=64"])
@pytest.mark.parametrize("ratio", [4, 8])
def test_open_pages_are_as_many_as_the_ratio_allows(text, ratio):
    recipe = resolve(text, ratio, 8192, SHAPE)
    named = Recipe.parse(text.replace("pages", "pages=1"))
    assert (recipe.formats, recipe.value_group, recipe.anchor_every) == (named.formats, named.value_group, named.anchor_every)
    assert (recipe.sinks, recipe.window) == (named.sinks, named.window)
    pages = (8192 - named.sinks - named.window) // 32
    more = (int(recipe.fractions[0] * pages) + 1.5) / pages
    text_of_more = str(named).replace("pages=1", f"pages={more}")
    assert read_ratio(Recipe.parse(text_of_more), [8192], SHAPE) < ratio <= read_ratio(recipe, [8192], SHAPE)


def test_open_pages_that_cannot_meet_the_ratio_are_refused_with_a_context():
    with pytest.raises(UsageError, match=r"int4 and one page.*from a context of \d+"):
        resolve("pages", 8, 500, SHAPE)


def test_a_group_that_does_not_divide_the_head_is_refused_before_anything_is_solved():
    for text in ("int4,vgroup=48,pages", "int4,vgroup=48", "int4,vgroup=48,pages=1/4"):
        with pytest.raises(UsageError, match="vgroup=48 does not divide"):
            resolve(text, 4, 4096, SHAPE)


def test_fractions_that_are_not_one_for_each_head_are_refused():
    with pytest.raises(UsageError, match="names 2 fractions for 16 KV heads"):
        resolve("int4,pages=1/2:1/4", 4, 4096, SHAPE)


def test_the_original_schedule_anchors_every_compress_steps():
    assert resolve("reuse,decay=0.95,sinks=0,window=0", 4, 4096, SHAPE).anchor_every == 4


def test_overrides_win_over_the_text():
    recipe = resolve("int8,window=64", 1, 4096, SHAPE, sinks=8, window=32)
    assert (recipe.sinks, recipe.window) == (8, 32)
    assert resolve("pages=1/4", 1, 4096, SHAPE, anchor_every=3).anchor_every == 3
    assert resolve("pages", 4, 8192, SHAPE, anchor_every=3, sinks=8).anchor_every == 3


@pytest.mark.parametrize("ratio", [0, 0.99, -1, float("nan"), float("inf"), 1e9])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(UsageError, match="out of range"):
        resolve("int8", ratio, 4096, SHAPE)


@pytest.mark.parametrize("fixed", [{"sinks": -1}, {"window": 1 << 21}, {"anchor_every": 0}])
@pytest.mark.parametrize("ratio", [1, 2])
def test_an_override_out_of_range_is_refused_at_every_ratio(fixed, ratio):
    with pytest.raises(UsageError, match="out of range"):
        resolve("auto", ratio, 4096, SHAPE, **fixed)


def test_fp16_models_keep_fp16():
    assert resolve("stride", 2, 4096, SHAPE, "fp16").key_format == "fp16"


def test_the_least_and_the_greatest_stride_are_found():
    assert resolve("stride", 1, 4096, SHAPE) == Recipe.parse("bf16,stride=1")
    context = 1 << 20
    most = read_ratio(Recipe.parse("int8,stride=64"), [context], SHAPE)
    assert resolve("int8,stride", most, context, SHAPE).stride == 64
    with pytest.raises(UsageError, match=r"the largest ratio is .*stride=64"):
        resolve("int8,stride", most * 1.01, context, SHAPE)
