"""The table of shapes says what the cells' results say, and names the cells that have none."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import kernels

RESULTS = Path(kernels.__file__).parent / "results" / "h100" / "kernels"
SHAPE = (1, 32, 8, 128, 32768)


@pytest.fixture
def result():
    return json.loads((RESULTS / f"{kernels.cell_name(SHAPE, 'int8')}.json").read_text())


def test_a_row_is_the_cells_own_figures(result):
    row = kernels.row("cell", result)
    times = {timing["name"]: timing for timing in result["contenders"]}
    wide = [t for t in times.values() if t["kind"] == "peer" and t["dtype"] != "fp8"]
    best = min(wide, key=lambda t: t["time_ms"])
    assert row["rival"] == best["name"]
    assert row["gain_over_rival"] == best["time_ms"] / times["elastic"]["time_ms"]
    # All bytes of the recipe at the read ceiling, against the peer's time.
    floor_ms = result["recipe"]["dense_bytes_per_step"] / row["ratio_read"] / result["ceilings"]["read_gbs"] / 1e6
    assert row["ceiling"] == pytest.approx(best["time_ms"] / floor_ms)
    assert row["of_ceiling"] == pytest.approx(floor_ms / times["elastic"]["time_ms"])
    assert row["hash"] == result["recipe"]["hash"]
    assert row["recipe_error"] == result["fidelity"]["sample"]["recipe_error"]


def test_an_8_bit_peer_is_no_rival_and_has_a_ratio_of_its_own(result):
    fp8 = next(timing for timing in result["contenders"] if timing["kind"] == "peer") | {
        "name": "flashinfer-x-fp8",
        "dtype": "fp8",
    }
    result["contenders"].append(fp8 | {"time_ms": 1e-3})
    row = kernels.row("cell", result)
    assert row["rival"] != "flashinfer-x-fp8"
    assert row["fastest_narrow_peer"]["name"] == "flashinfer-x-fp8"
    assert row["gain_over_narrow_peer"] == 1e-3 / row["us"] * 1e3
    assert kernels.peers_after_first(result, "all") == f"{row['rival']},flashinfer-x-fp8"
    assert kernels.peers_after_first(None, "all") == "all"


def test_a_recipe_may_name_its_budget():
    assert {"--recipe=auto", "--compress=8", "--seq=32768", "--kv-heads=8"} <= set(kernels.cell_options(SHAPE, "auto@8"))
    assert {"--recipe=int8,stride=2", "--compress=1"} <= set(kernels.cell_options(SHAPE, "int8,stride=2"))
    assert kernels.cell_name(SHAPE, "int8,stride=2@4") == "1-32-8-128-32768--int8-stride=2-4"


def test_a_cell_that_cannot_run_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(kernels.__file__).parents[1] / "src"))
    arguments = Namespace(tables=False, resume=False, reps=2, time_limit=1.0, backend="cpu", cell_timeout=100)
    said = kernels.measure(kernels.cell_options(SHAPE, "int99"), tmp_path / "cell.json", arguments)
    assert said.startswith("exit 2: ")
    assert "int99" in said


def test_tables_are_written_from_the_files_and_name_what_is_missing(tmp_path, result):
    (tmp_path / f"{kernels.cell_name(SHAPE, 'int8')}.json").write_text(json.dumps(result))
    shape = ",".join(map(str, SHAPE))
    command = [sys.executable, kernels.__file__, "--tables", f"--output={tmp_path}", f"--shapes={shape}", "--recipes=int8;int4"]
    subprocess.run(command, check=True, capture_output=True)
    text = (tmp_path / "summary.md").read_text()
    assert f"| {shape} | 134 | " in text
    assert "| 1-32-8-128-32768--int4 | not run: not measured |" in text
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["cell"].partition("--")[2] for row in rows] == ["int8", "int4"]
