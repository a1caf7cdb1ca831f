"""What the scripts that run tests write down."""

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


def recorded(script, tmp_path, *arguments):
    (tmp_path / "test_disasters.py").write_text(TESTS)
    command = [sys.executable, f"benchmarks/{script}.py", f"--output={tmp_path / 'record.json'}", *arguments, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": "src"}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["environment"]["commit"] and record["environment"]["date_utc"]
    assert record["command"][1] == f"benchmarks/{script}.py"
    return record


def test_each_fault_has_its_tests_and_how_they_ended(tmp_path):
    record = recorded("faults", tmp_path)
    rows = {row["fault"]: row for row in record["faults"]}
    assert {fault: (row["passed"], row["failed"], row["skipped"]) for fault, row in rows.items()} == {
        "flood": (1, 1, 0),
        "fire": (0, 1, 1),
    }
    assert [test["outcome"] for test in rows["fire"]["tests"]] == ["failed", "skipped"]
    assert "no fire here" in rows["fire"]["tests"][1]["reason"]


def test_the_suite_is_counted_and_what_failed_is_named(tmp_path):
    record = recorded("suite", tmp_path, "--", "-n", "2")
    assert record["tests"] == {"failed": 2, "passed": 1, "skipped": 1}
    assert [name.split("::")[1] for name in record["failed"]] == ["test_burns", "test_of_no_fault"]
    assert record["skipped"] == {"Skipped: no fire here": 1}
    assert list(record["by_folder"].values()) == [record["tests"]]
