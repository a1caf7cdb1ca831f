"""A benchmark under faults: what failed is said, what was measured is not lost, and no clock that jumps is a figure."""

import ast
import itertools
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

import elastickv
from elastickv.benchmark import Options, run, telemetry
from elastickv.benchmark.telemetry_probes import UnavailableError
from elastickv.errors import DeviceLost, RanOut
from tests.helpers.reference_backend import ReferenceBackend, ReferenceProgram

SMALL = {"seq": 340, "heads": 2, "dim": 64, "reps": 12, "warmup": 1, "inner_loops": 2, "cache": "hot", "paired": True}
SOURCES = sorted(Path(elastickv.__file__).parent.rglob("*.py"))
WALL_CLOCKS = {
    "time.time",
    "time.time_ns",
    "time",
    "datetime.now",
    "datetime.utcnow",
    "datetime.today",
    "datetime.datetime.now",
}


@pytest.fixture
def backend(monkeypatch):
    backend, module = ReferenceBackend(), sys.modules[run.__module__]
    monkeypatch.setattr(module, "load", lambda name, device, report=None: (backend, None))
    # The float64 reference on the real sample is most of a run's time here.
    monkeypatch.setattr(module, "_on_sample", lambda *_: module.OnSample(None, "left out"))
    return backend


def failing(error, after):
    """A program that fails at its launch number `after`."""
    launches, run_ = itertools.count(), ReferenceProgram.run

    def run_or_fail(self, number=1):
        if next(launches) >= after:
            raise error
        return run_(self, number)

    return run_or_fail


@pytest.mark.fault("out of memory")
@pytest.mark.parametrize("after", [0, 30])
@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_want_of_memory_while_it_measures_ends_the_run_with_what_to_do(backend, monkeypatch, after, error):
    monkeypatch.setattr(ReferenceProgram, "run", failing(error, after))
    expected = MemoryError if isinstance(error, MemoryError) else RanOut
    with pytest.raises(expected) as raised:
        run(Options(**SMALL, recipe="int8"))
    assert expected is MemoryError or "give a shorter `context`" in str(raised.value)
    assert not [thread for thread in threading.enumerate() if thread.name == "telemetry"]


@pytest.mark.fault("lost device")
def test_a_device_that_is_lost_while_it_measures_is_named(backend, monkeypatch):
    monkeypatch.setattr(ReferenceProgram, "run", failing(RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS"), 20))
    with pytest.raises(DeviceLost, match=r"context is gone.*new process"):
        run(Options(**SMALL, recipe="int8"))


class BreakingProbe:
    source = "nvml"

    def __init__(self, error, good):
        self.error, self.left, self.closed = error, good, False

    def read(self):
        if not self.left:
            raise self.error
        self.left -= 1
        return {"flags": []}

    def close(self):
        self.closed = True
        raise self.error


@pytest.mark.fault("NVML missing or failing")
@pytest.mark.parametrize("error", [UnavailableError("GPU is lost"), OSError("Unknown Error"), ValueError("not a figure")])
@pytest.mark.parametrize("good", [0, 1])
def test_a_probe_that_breaks_is_a_note_in_the_result_and_a_caution(backend, monkeypatch, error, good):
    probe, tell = BreakingProbe(error, good), threading.Event()
    monkeypatch.setattr(telemetry, "open_probe", lambda kind, device: probe)
    monkeypatch.setattr(telemetry.Telemetry.__init__, "__defaults__", (0, 0.001))  # read again at once
    monkeypatch.setattr(telemetry.threading, "excepthook", lambda arguments: tell.set())
    result = run(Options(**SMALL, recipe="int8"))
    assert result.complete and probe.closed and not tell.is_set()
    assert str(error) in result.telemetry["note"]
    assert any(line.startswith("the device was not watched all the time") for line in result.warnings)


@pytest.mark.fault("NVML missing or failing")
def test_without_nvml_the_result_says_so(backend, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(telemetry, "open_probe", lambda kind, device: telemetry.NvmlProbe(device))
    result = run(Options(**SMALL, recipe="int8"))
    assert result.complete
    assert any("pip install nvidia-ml-py" in line for line in result.warnings)


@pytest.mark.fault("clock jumps")
@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
def test_a_wall_clock_that_jumps_changes_no_figure(backend, monkeypatch, jump_s):
    honest, jumps = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: honest() + jump_s * next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * time.time()))
    began = time.monotonic()
    result = run(Options(**SMALL, recipe="int8", time_limit_s=60))
    took = time.monotonic() - began
    assert result.complete and result.convergence.stopped_by == "reps"
    assert all(0 <= reading["time_s"] <= took for reading in result.telemetry["readings"])
    assert np.isfinite(result.results.attention_time_ms) and result.results.attention_time_ms > 0
    assert datetime.fromisoformat(result.environment["date_utc"])


def _wall(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func) in WALL_CLOCKS


@pytest.mark.fault("clock jumps")
def test_no_duration_is_taken_from_a_wall_clock():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}: use time.monotonic"
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("time.time", "time.time_ns"), where
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                assert not {alias.name for alias in node.names} & {"time", "time_ns"}, where
            if isinstance(node, ast.BinOp):
                assert not _wall(node.left) and not _wall(node.right), where
            if isinstance(node, ast.Compare):
                assert not any(map(_wall, (node.left, *node.comparators))), where
