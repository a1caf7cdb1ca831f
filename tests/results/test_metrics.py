"""A metric that is added to the table is shown by every exporter, without another edit."""

import csv
import io
import json

import pytest

from elastickv import compare, report
from elastickv.results.measurement import Measurement
from elastickv.results.result_metrics import METRICS, Metric
from elastickv.sweeps.sweep_result import Sweep
from tests.helpers.results import ORIGINAL, quiet, result


@pytest.fixture
def saved(monkeypatch):
    metric = Metric("time saved a step", "µs", lambda r: 1e3 * (r.baseline.time_ms - r.results.attention_time_ms))
    monkeypatch.setitem(METRICS, "saved_us", metric)
    value = result(quiet(0.5), quiet(1.0))
    return value, 1e3 * (value["baseline"]["time_ms"] - value["results"]["attention_time_ms"])


def test_rows_and_texts_of_a_measurement_show_a_new_metric(saved):
    value, expected = saved
    measured = Measurement(value)
    assert measured.rows()[0]["saved_us"] == expected
    (row,) = csv.DictReader(io.StringIO(measured.to_csv()))
    assert float(row["saved_us"]) == expected
    assert f"| saved_us | {expected:.4g} |" in measured.to_markdown()
    for text in (str(measured), measured._repr_html_()):
        assert f"time saved a step, µs: {expected:.4g}" in text


def test_sweeps_show_a_new_metric(saved):
    value, expected = saved
    cells = [{"cell": {"seq": 1024}, "status": "ok", "reason": None, **value}, {"cell": {"seq": 2048}, "status": "failed"}]
    swept = Sweep({"axes": {"seq": [1024, 2048]}, "cells": 2}, cells)
    assert [row["saved_us"] for row in swept.rows()] == [expected, None]
    for text in (swept.to_csv(), swept.to_markdown(), swept._repr_html_()):
        assert "saved_us" in text


def test_reports_show_a_new_metric(saved):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    value, expected = saved
    made = report(value, ORIGINAL)
    assert [row["saved_us"] for row in made.rows()] == [expected, None]
    assert json.loads(made.to_json())["rows"][0]["saved_us"] == expected
    (section,) = [section for section in made.content.sections if section.name == "results"]
    column = section.tables[0].headers.index("time saved a step, µs")
    assert sorted(row[column] for row in section.tables[0].rows) == ["", f"{expected:.4g}"]
    assert "time saved a step, µs" in made.html and "time saved a step, µs" in made.markdown


def test_a_result_itself_stays_as_it_was(saved):
    value, _ = saved
    assert "saved_us" not in Measurement(value).as_dict()
    assert compare(value, value).rows
