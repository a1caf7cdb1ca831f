"""Predicted losses follow what was measured, and a recipe that reads less of something never looks better."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.recipe import Recipe, predicted_loss
from elastickv.recipe.losses import LOSSES_PATH, Losses, measured

FORMATS = ("int8", "fp8", "int4")
fractions = st.floats(1e-6, 1)
anchors = st.integers(1, 4096)


def test_the_figures_say_where_they_come_from():
    record = json.loads(LOSSES_PATH.read_text(encoding="utf-8"))
    assert record["script"] == "benchmarks/recipe_study.py"
    assert record["date_utc"] and record["versions"]
    for source in record["inputs"]:
        assert source["model"] and source["tokens"] and len(source["sha256"]) == 64


def test_every_pair_of_formats_has_a_figure():
    for key in FORMATS:
        for value in FORMATS:
            for group in (32, 40, 64, 128, 192, 256):
                assert 0 < measured().of_formats(key, value, group) < 0.1


def test_a_measured_fraction_and_schedule_give_their_figure():
    made_up = Losses({}, {1: ((0.5, 0.1), (0.25, 0.3)), 4: ((0.5, 0.2), (0.25, 0.25))}, 0.5)
    assert made_up.of_pages(0.5, 1) == pytest.approx(0.1)
    assert made_up.of_pages(1.0, 1) == 0
    assert made_up.of_pages(0.5**0.5, 1) == pytest.approx(0.05)
    assert made_up.of_pages(0.5, 2) == pytest.approx(0.15)
    # A schedule that happened to lose less counts as no better, and nothing is worse than reading nothing.
    assert made_up.of_pages(0.25, 4) == pytest.approx(0.3)
    assert made_up.of_pages(1 / 64, 1) == 0.5


@given(fractions, fractions, anchors)
def test_fewer_pages_never_lose_less(one, other, anchor_every):
    table = measured()
    assert table.of_pages(min(one, other), anchor_every) >= table.of_pages(max(one, other), anchor_every)


@given(fractions, anchors, anchors)
def test_rarer_anchors_never_lose_less(fraction, one, other):
    table = measured()
    assert table.of_pages(fraction, max(one, other)) >= table.of_pages(fraction, min(one, other))


@given(st.sampled_from(FORMATS), st.integers(32, 256), st.integers(32, 256))
def test_wider_groups_never_lose_less(key, one, other):
    table = measured()
    assert table.of_formats(key, "int4", max(one, other)) >= table.of_formats(key, "int4", min(one, other))


def test_dense_loses_nothing_and_what_was_not_measured_has_no_prediction():
    assert predicted_loss(Recipe.parse("dense"), 64) == 0
    assert predicted_loss(Recipe.parse("int8,stride=2"), 64) is None
    assert predicted_loss(Recipe.parse("bf16,reuse,anchor_every=4"), 64) is None


def test_heads_that_read_more_lower_the_loss_of_a_ragged_recipe():
    quarter, mixed, half = (predicted_loss(Recipe.parse(f"pages={f}"), 64) for f in ("1/4", "1/4:1/2", "1/2"))
    assert half < mixed < quarter
    assert predicted_loss(Recipe.parse("pages=1/4:1/4"), 64) == pytest.approx(quarter)


def test_the_whole_head_is_a_group_like_any_other():
    assert predicted_loss(Recipe.parse("int4"), 64) == predicted_loss(Recipe.parse("int4,vgroup=64"), 64)
    assert predicted_loss(Recipe.parse("int4"), 128) > predicted_loss(Recipe.parse("int4,vgroup=32"), 128)


def test_either_16_bit_format_rounds_as_much():
    record = json.loads(LOSSES_PATH.read_text(encoding="utf-8"))["formats"]
    assert predicted_loss(Recipe.parse("fp16"), 64) == predicted_loss(Recipe.parse("bf16"), 64) == record["k=bf16,v=bf16"]
    assert predicted_loss(Recipe.parse("k=fp16,v=int8"), 64) == record["k=bf16,v=int8"]
