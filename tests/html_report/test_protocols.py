"""What was measured in different ways is never averaged: it is a series of its own, and says how it was measured."""

import copy
import json

import pytest

from elastickv import report
from elastickv.html_report.charts.fidelity_charts import loss_charts
from elastickv.html_report.charts.time_charts import time_charts
from elastickv.html_report.method_labels import MeasuredTime, labeled_series
from elastickv.html_report.report_data import IntervalEstimate
from tests.helpers.pages import Page
from tests.helpers.results import COMMITTED, ORIGINAL, quiet, result

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


def timed(elastic_ms, speedup, **changes):
    """Return a result whose elastic step takes this time, with this speed-up; `changes` are keys by their path."""
    made = result(quiet(elastic_ms), quiet(1.0))
    made["speedup"] |= dict(zip(("estimate", "low", "high"), speedup, strict=True))
    for timing in made["contenders"]:
        if timing["name"] == "elastic":
            timing["time_ms"] = elastic_ms
    for path, value in changes.items():
        *before, last = path.split("__")
        inner = made
        for key in before:
            inner = inner[key]
        inner[last] = value
    return made


def elastic_series(steps):
    """Return label -> alternative text of the chart's rows for the elastic cache."""
    charts, left = time_charts(steps)
    assert not left
    return [label for chart in charts for label in chart.alt.split(": ", 1)[1].split("; ")[0].split(", ") if "elastic" in label]


def test_a_run_that_was_not_paired_is_drawn_apart_from_the_paired_ones():
    paired = timed(0.56, (1.78, 1.75, 1.81))
    other = timed(0.57, (1.79, 1.76, 1.82))
    alone = timed(7.0, (1.84, 0.13, 26.0), pairing="sequential")
    made = report(paired, other, alone)
    assert "1.780 [1.750, 1.810]" in made.content.headline.sentence or "1.790 [1.760, 1.820]" in made.content.headline.sentence
    labels = elastic_series(made.facts.steps)
    assert len(labels) == 2 and len(set(labels)) == 2
    assert any("not paired" in label for label in labels)
    speedups = made.figures["speedup-1"]
    assert ", not paired" in speedups and ", paired" in speedups
    rows = [row for row in Page(made.html).rows if "dense and elastic not in turns" in row]
    assert len(rows) == 1 and any("1.840× [0.130, 26.000]" in cell for cell in rows[0])
    assert {row["pairing"] for row in made.rows()} == {"abba", "sequential"}


@pytest.mark.parametrize(
    "change",
    [
        {"pairing": "sequential"}, {"build__cuda_graphs": True}, {"build__inner_loops_requested": 3},
        {"configuration__warmup": 1},
        {"build__truncate_percent": 10.0}, {"configuration__dtype": "fp16"}, {"schema_version": "1.9"},
        {"recipe__text": "int8"}, {"configuration__cache": "hot"}, {"gpu__name": "Another"}, {"configuration__batch": 2},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_results_that_differ_in_how_they_were_measured_are_not_averaged(change):
    steps = report(timed(0.5, (2.0, 1.9, 2.1)), timed(5.0, (2.1, 2.0, 2.2), **change)).facts.steps
    charts, _ = time_charts(steps)
    labels = [(chart.name, label) for chart in charts for label in chart.alt.split(", ") if "elastic" in label]
    assert len(set(labels)) == 2


def test_the_original_program_is_never_averaged_with_this_one():
    ours = timed(0.5, (2.0, 1.9, 2.1), gpu__name=ORIGINAL["gpu"]["name"], gpu__kind="gpu", configuration__cache="hot")
    labels = elastic_series(report(ours, ORIGINAL).facts.steps)
    assert len(set(labels)) == 2


def test_repetitions_of_one_measurement_are_still_one_bar():
    steps = report(timed(0.5, (2.0, 1.9, 2.1)), timed(0.6, (2.1, 2.0, 2.2)), timed(0.7, (2.1, 2.0, 2.2))).facts.steps
    assert len(elastic_series(steps)) == 1


def test_a_series_over_contexts_is_one_line_though_each_context_has_its_own_recipe():
    times = [
        MeasuredTime(context, IntervalEstimate(1.0), {"pairing": "abba", "inner loops": loops}, recipe)
        for context, loops, recipe in ((1024, 64, "int8"), (2048, 32, "int4"))
    ]
    assert list(labeled_series("elastic", times)) == ["elastic"]
    again = MeasuredTime(2048, IntervalEstimate(3.0), {"pairing": "abba", "inner loops": 32}, "int4,pages=0.5")
    series = labeled_series("elastic", [*times, again])
    assert series["elastic (int4,pages=0.5)"] == {2048: [IntervalEstimate(3.0)]}
    assert max(len(found) for contexts in series.values() for found in contexts.values()) == 1


def test_losses_on_different_texts_are_not_joined_by_a_line():
    one = json.loads((COMMITTED / "cpu" / "fidelity-smollm2-135m-4096.json").read_text(encoding="utf-8"))
    other = copy.deepcopy(one) | {"texts": ["another text"]}
    other["rows"][-1]["kl"]["mean"] *= 1.5
    charts = list(loss_charts(report(one, other).facts.evaluations))
    assert len(charts) == 2 * len(list(loss_charts(report(one).facts.evaluations)))
    assert any("another text" in chart.alt for chart in charts)
