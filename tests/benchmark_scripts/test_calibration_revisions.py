"""The comparison of two source trees that calibrate alternates them and compares every error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny_models import tiny_gguf

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "calibration_revisions.py"
SOURCE = SCRIPT.parents[1] / "src"


def test_both_trees_calibrate_and_their_errors_are_compared(tmp_path):
    pytest.importorskip("transformers")
    output = tmp_path / "calibration.json"
    command = [sys.executable, str(SCRIPT), f"--before={SOURCE}", f"--model={tiny_gguf(tmp_path / 'tiny.gguf')}"]
    command += ["--tokens=800", "--pairs=2", f"--output={output}"]
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert record["largest_relative_difference"] == 0 and record["errors"] > 50
    assert len(record["wall_s"]["before"]) == len(record["cpu_s"]["after"]) == 2
    assert record["model"] == "tiny.gguf" and str(tmp_path) not in json.dumps(record)
