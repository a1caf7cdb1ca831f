"""A model's cells: a file and a line each, whatever becomes of them."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("models")


@pytest.fixture
def run(models, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))

    def call(*arguments):
        command = ["models.py", f"--out={tmp_path}", "--model=shape:tiny", "--reps=2", "--tokens=2", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        return models.main(), capsys.readouterr().out.splitlines(), tmp_path

    return call


def test_a_cell_is_a_file_and_a_line(run):
    status, lines, folder = run("--cells=300x2", "--", "--backend=cpu")
    assert status == 0 and len(lines) == 1
    record = json.loads((folder / "model-tiny-300x2.json").read_text(encoding="utf-8"))
    assert (record["context"], record["batch"], record["rounds"], record["tokens"]) == (300, 2, 2, 2)
    assert lines[0].startswith("300x2: stock ") and "too few pairs" in lines[0] and "needs CUDA" in lines[0]


def test_a_cell_that_fails_is_a_reason_and_the_next_goes_on(run):
    status, lines, folder = run("--cells=9000x1,300x1", "--", "--backend=cpu")
    assert status == 1 and len(lines) == 2
    assert "8192 positions" in lines[0] and lines[1].startswith("300x1: stock ")
    assert [path.name for path in folder.iterdir()] == ["model-tiny-300x1.json"]


def test_a_cell_that_takes_too_long_is_stopped(run):
    status, lines, folder = run("--cells=300x1,300x2", "--cell-timeout=0.2", "--time-limit=0.9")
    assert status == 1 and "not done after" in lines[0] and "no time left" in lines[1]
    assert not list(folder.iterdir())


@pytest.mark.parametrize("text", ["", "65536", "0x1", "4096x1;4096x2"])
def test_cells_that_are_none_are_refused(run, text):
    with pytest.raises(SystemExit):
        run(f"--cells={text}")


def test_the_file_of_a_folder_or_a_gguf_file_is_named_after_it(models):
    assert models.cell_file("/models/Some-1.5B.gguf", (64, 2)) == "model-Some-1.5B.gguf-64x2.json"
    assert models.cell_file("shape:8b", (65536, 1)) == "model-8b-65536x1.json"
