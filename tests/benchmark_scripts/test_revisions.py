"""The comparison of two source trees measures both, in mirrored order, and writes down every pair."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "revisions.py"
SOURCE = SCRIPT.parents[1] / "src"


def run(*arguments):
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    command = [sys.executable, str(SCRIPT), f"--before={SOURCE}", "--backend=cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_every_program_of_both_trees_is_measured(tmp_path):
    output = tmp_path / "revisions.json"
    done = run("--shapes=1,2,1,64,700", "--recipes", "int4", "auto@4", "--pairs=6", f"--output={output}")
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert [(row["recipe"], row["program"]) for row in record["rows"]] == [
        ("int4", "decode"), ("auto@4", "cycle"), ("auto@4", "decode"),
    ]  # fmt: skip
    for row in record["rows"]:
        before, after = row["samples_us"]
        assert len(before) == len(after) >= 6
        assert row["ratio"][1] <= row["ratio"][0] <= row["ratio"][2]


def test_too_few_pairs_are_refused_before_anything_runs(tmp_path):
    done = run("--pairs=2", f"--output={tmp_path / 'none.json'}")
    assert done.returncode == 2
    assert "at least 6 pairs" in done.stderr
    assert not (tmp_path / "none.json").exists()
