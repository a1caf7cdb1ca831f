"""The shares of requests' own ratios: solved once each, for all layers together, and no more of them remembered than fit."""

import pytest

from elastickv.recipe import AttentionShape, Recipe
from elastickv.vllm.layer_formats import ServedModel, at_ratio
from elastickv.vllm.selection import ratio_shares
from elastickv.vllm.selection.ratio_shares import RatioShares

MODEL = ServedModel(AttentionShape(1, 4, 2, 64), 3, context=32768)
RECIPES = {
    0: Recipe.parse("int4,pages=1/8:1/4,anchor_every=4,sinks=0"),
    2: Recipe.parse("int8,sinks=0"),
    1: Recipe.parse("int4,pages=1/16,anchor_every=2,sinks=0"),
}


@pytest.fixture
def solved(monkeypatch):
    """The ratios that are solved, in order."""
    ratios = []
    monkeypatch.setattr(ratio_shares, "at_ratio", lambda *given: ratios.append(given[1]) or at_ratio(*given))
    return ratios


def test_shares_are_those_of_the_recipes_by_layer_and_head():
    shares, larger = RatioShares(RECIPES, MODEL), at_ratio(RECIPES, 2.5, MODEL)
    assert larger != RECIPES
    for ratio, recipes in ((None, RECIPES), (2.5, larger)):
        for layer, recipe in recipes.items():
            assert shares.of_layer(layer, ratio).tolist() == [recipe.fraction(0), recipe.fraction(1)]
    assert shares.of_layers([1, 0], 2.5).tolist() == [shares.of_layer(layer, 2.5).tolist() for layer in (1, 0)]


def test_a_ratio_is_solved_once_however_many_requests_have_their_own(solved):
    shares, ratios = RatioShares(RECIPES, MODEL), [2 + n / 1024 for n in range(1024)]
    for _ in range(2):
        for ratio in ratios:
            shares.of_layer(0, ratio), shares.of_layers([0, 1], ratio)
    assert solved == ratios


def test_ratios_that_were_asked_for_least_recently_are_forgotten(solved, monkeypatch):
    monkeypatch.setattr(ratio_shares, "RATIOS", 2)
    shares = RatioShares(RECIPES, MODEL)
    for ratio in (2.0, 2.1, 2.0, 2.2, 2.0, 2.1):
        shares.of_layer(0, ratio)
    assert solved == [2.0, 2.1, 2.2, 2.1]
