"""Bytes of the scored steps are those of the recipes, step by step."""

import pytest

from elastickv.errors import UsageError
from elastickv.evaluation.recipes_by_ratio import Span, measured, plan
from elastickv.recipe import DENSE, AttentionShape, Recipe, dense_bytes, step_bytes
from tests.recipe.test_layer_solver import CALIBRATION

SHAPE = AttentionShape(1, 4, 2, 64)
SPAN = Span(2000, 70)


def test_bytes_are_summed_over_the_steps_with_their_anchors():
    recipes = (Recipe.parse("int4,pages=1/4,anchor_every=4"), Recipe.parse("int8"))
    recipes_at_ratio = measured(2, recipes, SPAN, SHAPE, "fp32")
    read = [step_bytes(r, [2001 + s], SHAPE, "fp32", s % r.anchor_every).kv for r in recipes for s in range(70)]
    dense = 2 * sum(dense_bytes([2001 + s], SHAPE) for s in range(70))
    assert recipes_at_ratio.read_ratio == pytest.approx(dense / sum(read))
    assert recipes_at_ratio.step_bytes == pytest.approx(sum(read) / 70)
    assert 1.5 < recipes_at_ratio.stored_ratio < recipes_at_ratio.read_ratio


@pytest.mark.parametrize("calibration", [None, CALIBRATION], ids=["uniform", "calibrated"])
@pytest.mark.parametrize("ratio", [1, 2, 4, 7.5])
def test_the_ratio_holds_over_the_span(calibration, ratio):
    recipes_at_ratio = plan(ratio, SPAN, SHAPE, 3, "fp32", calibration)
    assert recipes_at_ratio.read_ratio >= ratio
    assert len(recipes_at_ratio.recipes) == 3


def test_layers_that_are_alike_have_the_recipes_hash():
    assert measured(1, (DENSE, DENSE), SPAN, SHAPE, "fp32").hash == DENSE.hash
    mixed = measured(1, (DENSE, Recipe.parse("int8")), SPAN, SHAPE, "fp32").hash
    assert mixed not in (DENSE.hash, Recipe.parse("int8").hash) and len(mixed) == 12
    assert mixed != measured(1, (Recipe.parse("int8"), DENSE), SPAN, SHAPE, "fp32").hash


def test_a_calibration_of_other_layers_is_refused():
    with pytest.raises(UsageError, match="3 layers and the model 5"):
        plan(2, SPAN, SHAPE, 5, "fp32", CALIBRATION)


def test_a_ratio_that_the_context_is_too_short_for_is_refused():
    with pytest.raises(UsageError, match="cannot be met"):
        plan(8, Span(300, 20), SHAPE, 3, "fp32", CALIBRATION)
