"""The clock that times an evaluation's phases."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("evaluation_time")
    sys.modules.pop("evaluation_time", None)


def test_every_phase_is_in_the_file_as_soon_as_it_has_ended(script, tmp_path):
    clock = script.Clock(tmp_path / "times.json", {"model": "a model"})
    clock.phase("calibrating")
    clock.progress(3, 4)
    clock.phase("C=4 at 2048 tokens")
    record = json.loads((tmp_path / "times.json").read_text(encoding="utf-8"))
    assert [one["phase"] for one in record["phases"]] == ["starting", "calibrating"]
    assert record["phases"][1]["steps"] == 3 and record["model"] == "a model"
    assert clock.seconds("calib") == record["phases"][1]["seconds"] and clock.seconds("C=4") == 0


def test_the_host_is_seen_in_the_innermost_function_of_elastickv(script, tmp_path):
    from elastickv.evaluation.generations.repetition import repetition_rate

    clock = script.Clock(tmp_path / "times.json", {})
    clock.phase("repetition")
    ends = time.monotonic() + 20
    while not clock._looks and time.monotonic() < ends:
        repetition_rate(list(range(20000)))
    clock.phase("end")
    host = json.loads((tmp_path / "times.json").read_text(encoding="utf-8"))["phases"][1]["host"]
    assert any(where.startswith("repetition.repetition_rate") for where in host)
