"""The soak passes a sound backend and sees a fault."""

import importlib.util
from pathlib import Path

import pytest

from elastickv.backends.cpu.backend import CpuBackend
from elastickv.recipe import AttentionShape

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"
spec = importlib.util.spec_from_file_location("soak", SCRIPT)
soak = importlib.util.module_from_spec(spec)
spec.loader.exec_module(soak)


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setattr(soak, "SHAPE", AttentionShape(2, 4, 2, 64))
    monkeypatch.setattr(soak, "LONGEST", 900)
    monkeypatch.setattr(soak, "LEG", 40)
    return CpuBackend()


@pytest.mark.parametrize("text", ["dense", "int4,pages=1/4,anchor_every=4"])
def test_a_sound_back_end_passes(backend, text):
    row = soak.soak(backend, "fp32", text, 100)
    assert (row["steps"], row["legs"], row["checked_outputs"]) == (100, 3, 9)
    assert row["largest_error"] < soak.KERNEL_ERROR
    assert soak.replays(backend, "fp32", text, 5)["differing"] == 0


def test_a_wrong_output_is_seen(backend, monkeypatch):
    def off_by_a_little(oracle, queries, decode=soak.Oracle.decode):
        outputs, lse = decode(oracle, queries)
        return outputs * 1.01, lse

    monkeypatch.setattr(soak.Oracle, "decode", off_by_a_little)
    assert soak.soak(backend, "fp32", "int4", 40)["largest_error"] > soak.KERNEL_ERROR
