"""What the script that provokes faults writes down."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest

@pytest.mark.fault("flood")
def test_swims():
    pass

@pytest.mark.fault("fire")
@pytest.mark.fault("flood")
def test_burns():
    assert False

@pytest.mark.fault("fire")
@pytest.mark.skip(reason="no fire here")
def test_skipped():
    pass

def test_of_no_fault():
    assert False
"""


def test_each_fault_has_its_tests_and_how_they_ended(tmp_path):
    (tmp_path / "test_disasters.py").write_text(TESTS)
    command = [sys.executable, "benchmarks/faults.py", f"--output={tmp_path / 'faults.json'}", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": "src"}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    record = json.loads((tmp_path / "faults.json").read_text())
    rows = {row["fault"]: row for row in record["faults"]}
    assert {fault: (row["passed"], row["failed"], row["skipped"]) for fault, row in rows.items()} == {
        "flood": (1, 1, 0),
        "fire": (0, 1, 1),
    }
    assert [test["outcome"] for test in rows["fire"]["tests"]] == ["failed", "skipped"]
    assert "no fire here" in rows["fire"]["tests"][1]["reason"]
    assert record["environment"]["commit"] and record["environment"]["date_utc"]
    assert record["command"][1] == "benchmarks/faults.py"
