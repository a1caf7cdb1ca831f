"""Decodes that read the best pages alone: what each token reads depends on its position and its past, not on the schedule."""

import pytest

from elastickv.recipe import Recipe
from elastickv.vllm import model_setup
from tests.helpers.read_rule import follows
from tests.helpers.serving_scenarios import WINDOW, all_follow, random_prompts

RECIPES = {0: "int4,pages=1/4:1/2,anchor_every=4", 1: "int4,pages=1/3,anchor_every=3"}
LENGTHS, NEW_TOKENS = (400, 37, 300, 64, 5), 90


@pytest.fixture(scope="module")
def selecting(serve):
    """Return engines whose layers have these recipes, as a calibration may choose them."""
    recipes = {layer: Recipe.parse(f"{text},sinks=0,window={WINDOW}") for layer, text in RECIPES.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_setup, "layer_recipes", lambda *arguments: recipes)
        serve.close()
        yield lambda **options: serve(**{"elastickv": {"compress": 4}} | options)
        serve.close()


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(LENGTHS, seed=3)


@pytest.fixture(scope="module")
def selected(rule):
    return rule(layers=RECIPES)


@pytest.fixture(scope="module")
def together(selecting, prompts):
    return selecting().generate(prompts, NEW_TOKENS)


def test_answers_follow_the_rule_of_selected_pages(together, selected):
    all_follow(selected, together)


@pytest.mark.parametrize(
    "other",
    [
        {0: "int4", 1: RECIPES[1]},
        {0: RECIPES[0], 1: "int4,pages=1/3,anchor_every=4"},
        {0: "int4,pages=1/2:1/4,anchor_every=4", 1: RECIPES[1]},
    ],
    ids=["every page", "other anchors", "other heads"],
)
def test_another_selection_is_noticed(together, rule, other):
    for answer in (together[0], together[2]):
        assert follows(rule(layers=other), answer) is not None
