"""A cell in which `auto` fell back to dense is no ordinary one: every table of a sweep shows it."""

import json
from types import SimpleNamespace

import pytest

from elastickv.benchmark import Options, run
from elastickv.sweeps import worker
from elastickv.sweeps.sweep_result import Sweep
from tests.helpers.reference_backend import measure_as_timed

SMALL = {"seq": 340, "heads": 2, "dim": 64, "reps": 4, "warmup": 1, "inner_loops": 2, "cache": "hot", "paired": True}


@pytest.fixture
def record(monkeypatch):
    measure_as_timed(monkeypatch).update(elastic=2.0)
    result = run(Options(**SMALL, compress=1.3)).as_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "run", lambda options, reporter: SimpleNamespace(as_dict=lambda: result))
        state, measured = worker.measured({"bench": {"input": None, "command": []}}, None)
    assert state == "done"
    return {"cell": {"seq": 340, "compress": 1.3}} | measured


def shown(record):
    return Sweep({"axes": {"seq": [340], "compress": [1.3]}, "cells": 1}, [json.loads(json.dumps(record))])


def test_the_record_keeps_its_status_and_says_why_it_fell_back(record):
    assert record["status"] == "ok"
    assert record["reason"].startswith("auto fell back to dense-bf16: int8 took")


def test_every_table_shows_the_fallback(record):
    sweep = shown(record)
    (row,) = sweep.rows()
    assert row["status"] == "fell back"
    assert row["fallback"] == row["reason"] == record["reason"]
    assert row["ratio_read"] == 1
    for table in (sweep.to_csv(), sweep.to_markdown(), sweep._repr_html_()):
        assert "fell back" in table and "auto fell back to dense-bf16" in table


def test_a_fallback_of_an_older_file_is_shown_too(record):
    del record["recipe"]["fallback"]
    record["reason"] = None
    record["warnings"][0] = "auto fell back to dense: int8 took 9 us a step, dense-fp32 8 us"
    (row,) = shown(record).rows()
    assert row["status"] == "fell back" and row["fallback"].endswith("dense-fp32 8 us")


def test_a_cell_that_measured_its_recipe_is_ok(record):
    record["recipe"]["fallback"], record["reason"], record["warnings"] = None, None, []
    (row,) = shown(record).rows()
    assert (row["status"], row["fallback"]) == ("ok", None)
