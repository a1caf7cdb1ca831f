"""Provoke every fault that a test has, and write down what came of it: python benchmarks/faults.py --output FILE.json."""

import argparse
import time
from collections import Counter
from pathlib import Path

import pytest
from command_line import exit_with
from suite import Outcomes, heading

from elastickv.results.files import check_writable
from elastickv.results.formats import dumps, write_text

ROOT = Path(__file__).resolve().parents[1]
KIND, VERSION = "elastickv-faults", 1


class Recorder(Outcomes):
    """Keeps the outcome of each test with the faults that it provokes.

    Attributes
    ----------
    faults : fault -> ids of its tests.
    """

    def __init__(self):
        super().__init__()
        self.faults = {}

    def pytest_collection_finish(self, session):
        for item in session.items:
            for mark in item.iter_markers("fault"):
                self.faults.setdefault(mark.args[0], []).append(item.nodeid)

    def rows(self):
        """Return a row a fault, with how its tests ended."""
        return [self._row(fault, sorted(ids)) for fault, ids in sorted(self.faults.items())]

    def _row(self, fault, ids):
        tests = [
            {"id": name, "outcome": self.outcomes.get(name, "not run")}
            | ({"reason": self.reasons[name]} if name in self.reasons else {})
            for name in ids
        ]
        count = Counter(test["outcome"] for test in tests)
        return {"fault": fault} | {name: count[name] for name in ("passed", "failed", "skipped", "not run")} | {"tests": tests}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("tests", nargs="*", default=["tests"], help="files or folders of tests")
    arguments = parser.parse_args()
    check_writable(arguments.output)
    start, recorder = time.monotonic(), Recorder()
    # In this process alone: workers of pytest-xdist would not tell the markers.
    code = pytest.main(["-q", "-p", "no:xdist", "-m", "fault", f"--rootdir={ROOT}", *arguments.tests], plugins=[recorder])
    rows = recorder.rows()
    write_text(arguments.output, dumps(heading(KIND, VERSION, start) | {"faults": rows}))
    for row in rows:
        print(f"{row['fault']}: {row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped")
    return int(code)


if __name__ == "__main__":
    exit_with(main)
