"""The factor on the shares of the pages: layers together read what their recipes count, and the ratio decides it."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickv.recipe import AttentionShape, Recipe, byte_counts, interval_bytes
from elastickv.recipe.byte_counts import dense_bytes
from elastickv.transformers.budget import Budget, scaled

SELECTING = ("int4", "k=int4,v=fp8", "k=int8_per_channel,v=int4", "int2", "k=int3,v=int8", "k=int4,v=bf16")
OTHERS = ("int8", "int8,stride=3", "int8,reuse,anchor_every=4", "bf16")
SHARES = st.one_of(st.sampled_from([1, 1 / 2, 1 / 3, 1 / 8, 1 / 32]), st.floats(1e-4, 1))


@st.composite
def budgets(draw):
    """Return a budget of up to five layers, whose recipes have one window, as those of a model do."""
    kv_heads, head_dim = draw(st.sampled_from([1, 2, 8])), draw(st.sampled_from([64, 80, 128]))
    exact = f"sinks={draw(st.sampled_from([0, 4]))},window={draw(st.sampled_from([0, 100, 128]))}"

    def recipe():
        if draw(st.integers(0, 4)) == 0:
            return Recipe.parse(f"{draw(st.sampled_from(OTHERS))},{exact}")
        shares = draw(st.lists(SHARES, min_size=kv_heads, max_size=kv_heads))[: draw(st.sampled_from([1, kv_heads]))]
        every = draw(st.sampled_from([1, 2, 3, 16, 33, 100]))
        text = f"{draw(st.sampled_from(SELECTING))},pages={':'.join(f'{share:.9f}' for share in shares)}"
        return Recipe.parse(f"{text},anchor_every={every},{exact}")

    recipes = {layer: recipe() for layer in range(draw(st.integers(1, 5)))}
    shape, dtype = AttentionShape(1, 2 * kv_heads, kv_heads, head_dim), draw(st.sampled_from(["bf16", "fp32"]))
    return Budget(recipes, shape, dtype, draw(st.floats(1, 30)), context=0, fixed=False)


def counted_ratio(budget, context, scale):
    """Return the ratio by the bytes that each recipe counts."""
    read = [
        interval_bytes(scaled(recipe, scale), [context], budget.shape, budget.dtype).kv for recipe in budget.recipes.values()
    ]
    return len(read) * dense_bytes([context], budget.shape) / sum(read)


@given(budgets(), st.integers(1, 200_000), st.one_of(st.none(), st.just(1.0), st.floats(2.0**-40, 100)))
def test_layers_read_what_their_recipes_count(budget, context, scale):
    assert budget.ratio_at(context, scale) == pytest.approx(counted_ratio(budget, context, scale), rel=1e-12)


@given(budgets(), st.integers(1, 60_000))
@settings(max_examples=50)
def test_the_factor_is_the_largest_that_meets_the_ratio_where_a_page_turns_cold_and_before(budget, context):
    scale = budget.reading(context).scale
    selecting = [recipe for recipe in budget.recipes.values() if recipe.selection == "pages"]
    if scale in (None, 1.0) or not selecting:
        return
    first = budget.recipes[0]
    worst = context + (first.sinks + first.window - 1 - context) % 32
    met = [counted_ratio(budget, each, scale) * (1 + 1e-12) >= budget.ratio for each in (context, worst)]
    more = [counted_ratio(budget, each, scale * 1.0001) >= budget.ratio for each in (context, worst)]
    if math.log2(scale) > -39:
        assert all(met)
    assert not all(more) or all(share * scale < 2e-6 for recipe in selecting for share in recipe.fractions)


def test_a_ratio_is_solved_without_counting_head_by_head(monkeypatch):
    """An engine waits while it is: for 32 layers of 8 heads that took up to 2 seconds."""
    shares = ":".join(f"1/{n}" for n in range(2, 10))
    recipes = {layer: Recipe.parse(f"int4,pages={shares},anchor_every={2 ** (layer % 5)},sinks=0") for layer in range(32)}
    budget = Budget(recipes, AttentionShape(1, 32, 8, 128), "bf16", 4, context=0, fixed=False)
    monkeypatch.setattr(byte_counts, "_head_bytes", None)
    scale = budget.reading(131_072).scale
    monkeypatch.undo()
    assert scale is not None and 4 <= counted_ratio(budget, 131_072, scale) < 4.01
