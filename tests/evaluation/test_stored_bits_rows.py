"""Budgets of stored bits through the evaluation: rows by name, their formats by layer, and what cannot be measured."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from elastickv.errors import UsageError
from elastickv.evaluation.calibrate import calibrate
from elastickv.evaluation.evaluate import EvaluationOptions, evaluate
from elastickv.evaluation.exact_tokens import ExactTokens
from elastickv.evaluation.format_paths import unmet_budgets
from elastickv.evaluation.texts import Text
from elastickv.html_report.model_results import evaluation_view
from elastickv.recipe import Recipe, stored_bits
from elastickv.results.formats import plain_json
from elastickv.results.formats.fidelity_table import fidelity_tables
from elastickv.results.kinds.evaluation_result import EvaluationResult
from tests.evaluation.test_evaluate import TEXTS, Silent
from tests.helpers.tiny_models import TEXT, tiny_llama

BUDGETS = (2.7, 3.0, 5.5, 8.5)
OPTIONS = EvaluationOptions(
    ratios=(), contexts=(400,), window_count=2, scored=6, needle_lengths=(), greedy_tokens=0, stored_bits=BUDGETS,
    formats=("int4",),
)  # fmt: skip


@pytest.fixture(scope="module")
def loaded():
    return tiny_llama()


@pytest.fixture(scope="module")
def calibration(loaded):
    return calibrate(loaded, Text("other", TEXT[1000:3000]), 1000)


@pytest.fixture(scope="module")
def result(loaded, calibration):
    return evaluate(loaded, TEXTS, OPTIONS, calibration, Silent())


def test_each_budget_that_can_be_met_is_a_row_within_it(result):
    rows = {row["cache"]: row for row in result["rows"]}
    names = [f"stored_bits={budget:g}" for budget in BUDGETS[1:]]
    assert list(rows) == [row for name in names for row in (name, f"reference:{name}")] + ["int4"]
    for budget in BUDGETS[1:]:
        row = rows[f"stored_bits={budget:g}"]
        bits = [stored_bits(Recipe.parse(recipe), 64) for recipe in row["recipes"]]
        assert len(bits) == 2 and row["stored_format"]["bits_per_element"] == sum(bits) / 2 <= budget
        assert row["compress"] is None and row["expected_error"] > 0 and row["read_ratio"] > 1
        reference = rows[f"reference:stored_bits={budget:g}"]
        assert reference["recipes"] == row["recipes"], "the CPU reads all formats"
        assert reference["stored_format"]["bits_per_element"] == row["stored_format"]["bits_per_element"]
    assert rows["stored_bits=3"]["stored_format"]["bits_per_element"] <= 3
    for prefix in ("", "reference:"):
        kl = [rows[prefix + name]["kl"]["mean"] for name in names]
        assert kl[0] > kl[1] > kl[2] and kl[1] < rows["int4"]["kl"]["mean"]
    assert [line for line in result["skipped"] if "stored_bits=2.7 is less" in line and "give 2.75 or more" in line]


def test_tables_and_report_name_the_budget_and_the_formats_of_the_layers(result):
    read = EvaluationResult.from_dict(json.loads(plain_json.dumps(result)))
    shown = fidelity_tables(read)
    row = next(row for row in read.rows if row.cache == "stored_bits=5.5")
    assert len(set(row.recipes)) == 2, "the layers of this model differ"
    assert f"stored_bits=5.5, layers with full attention from 0 on: {row.recipes[0]} in 0; {row.recipes[1]} in 1." in shown
    assert "calibrated on 1000 tokens of other" in shown and read.options["stored_bits"] == list(BUDGETS)
    view = evaluation_view(read, "source")
    assert [loss.cache for loss in view.losses] == [row.cache for row in read.rows]


def test_all_rows_have_the_exact_tokens_that_were_asked_for(loaded, calibration):
    options = replace(OPTIONS, stored_bits=(5.0,), exact_tokens=ExactTokens(0, 64), window_count=1)
    rows = evaluate(loaded, TEXTS, options, calibration, Silent())["rows"]
    assert len(rows) == 3
    assert len({(row["stored_format"]["sinks"], row["stored_format"]["exact_keys"]) for row in rows}) == 1
    assert rows[0]["stored_format"]["sinks"] == 0 and rows[0]["stored_format"]["exact_keys"] < 64 + 32


def test_layers_in_a_row_are_named_in_short(result):
    read = EvaluationResult.from_dict(json.loads(plain_json.dumps(result)))
    recipes = ["int4"] * 4 + ["int8", "int4", "int8", "int8"]
    shown = fidelity_tables(replace(read, rows=[replace(read.rows[1], recipes=recipes)]))
    assert "from 0 on: int4 in 0-3, 5; int8 in 4, 6, 7." in shown


def test_where_a_device_reads_too_few_formats_a_budget_has_its_reference(loaded, calibration):
    """Without int3 and int2, which have no CUDA kernels, 4.25 bits are out of reach in heads of 64 channels."""
    subject = SimpleNamespace(
        calibration=calibration, device="cuda", loaded=SimpleNamespace(name="tiny"), elastic=calibration.layers, dtype="fp32"
    )
    (reason,) = unmet_budgets(subject, (4.25, 5.0))
    assert "stored_bits=4.25 is less than any calibrated format that CUDA reads takes: give 4.75 or more" in reason
    assert len(unmet_budgets(subject, (4.25,))) == 1, "its reference is measured"
    with pytest.raises(UsageError, match=r"stored_bits=2\.7 is less"):
        unmet_budgets(subject, (2.7,))


@pytest.mark.parametrize(
    ("budgets", "calibrated", "named"),
    [
        ((4.75,), False, "`stored_bits`=4.75 needs a calibration, .* `elastickv calibrate tiny -o FILE`"),
        ((2.0, 2.5), True, r"stored_bits=2\.5 is less than any .*: give 2\.75 or more"),
        ((5.0, 17.0), True, "`stored_bits`=17.0 is out of range"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(loaded, calibration, budgets, calibrated, named):
    options = replace(OPTIONS, stored_bits=budgets)
    with pytest.raises(UsageError, match=named):
        evaluate(loaded, TEXTS, options, calibration if calibrated else None, Silent())
