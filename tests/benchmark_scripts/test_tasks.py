"""The script that measures tasks: a result after every task, and what is left out."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastickv.results.kinds.evaluation_result import EvaluationResult
from tests.helpers.tiny_models import tiny_gguf

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tasks.py"


@pytest.fixture
def run(tmp_path):
    pytest.importorskip("transformers")

    def call(*arguments):
        output = tmp_path / "tasks.json"
        command = [sys.executable, str(SCRIPT), str(tiny_gguf(tmp_path / "tiny.gguf", positions=4096)), str(output)]
        command += ["--device=cpu", "--dtype=fp32", "--items=2", *arguments]
        environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1] / "src"), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment), output

    return call


def test_finished_tasks_stand_in_one_result_and_others_are_named(run):
    done, output = run("--compress=1", "--tasks=fwe,cwe", "--lengths=1300,1400")
    assert done.returncode == 1, done.stderr
    record = json.loads(output.read_text(encoding="utf-8"))
    assert [(task["task"], task["tokens"]) for task in record["tasks"]] == [("fwe", 1300), ("fwe", 1400)]
    assert record["complete"] is False and record["options"]["task_lengths"] == [1300, 1400]
    assert "cwe at 1300 tokens left out: `task_lengths`=1300 is too short for cwe" in done.stderr
    assert len(EvaluationResult.from_dict(record).tasks) == 2


def test_processes_share_the_tasks_and_a_further_call_measures_what_is_missing(run, monkeypatch, capsys):
    done, output = run("--compress=1", "--tasks=fwe", "--lengths=1300,1400", "--processes=2", "--items=1")
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text(encoding="utf-8"))
    assert [(task["task"], task["tokens"]) for task in record["tasks"]] == [("fwe", 1300), ("fwe", 1400)] and record["complete"]
    assert [path.name for path in output.parent.glob("*.json")] == [output.name]

    def plan(*arguments):
        monkeypatch.syspath_prepend(str(SCRIPT.parent))
        command = ["tasks.py", str(output.parent / "tiny.gguf"), str(output), "--device=cpu", "--dtype=fp32", "--items=1"]
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        script = importlib.import_module("tasks")
        return script.Plan.of(script.arguments())

    more = plan("--compress=1", "--tasks=fwe,vt", "--lengths=1400,1500")
    assert more.missing(more.measured()) == [("vt", 1400), ("fwe", 1500), ("vt", 1500)]
    other = plan("--compress=2", "--tasks=fwe", "--lengths=1300")
    assert other.measured() is None and "tasks.json was measured in another way" in capsys.readouterr().err
    sys.modules.pop("tasks")


def test_without_time_nothing_is_begun(run):
    done, output = run("--tasks=fwe", "--minutes=0")
    assert done.returncode == 1 and done.stderr.endswith("no task was finished\n") and not output.exists()
