"""Run the tests on this machine and write down what came of them: python benchmarks/suite.py --output FILE.json.

Arguments behind `--` go to pytest, such as `-- -n 14 --dist loadgroup -m gpu` on a machine with a GPU. Exit code: pytest's.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from command_line import exit_with
from gpu_name import gpu_name

from elastickv.benchmark.environment import environment
from elastickv.results.files import check_writable
from elastickv.results.formats import dumps, write_text

ROOT = Path(__file__).resolve().parents[1]
KIND, VERSION = "elastickv-suite", 1


class Outcomes:
    """A pytest plugin that keeps how each test ended.

    Attributes
    ----------
    outcomes : test id -> 'passed', 'failed' or 'skipped'.
    reasons : test id -> why it was skipped.
    """

    def __init__(self):
        self.outcomes, self.reasons = {}, {}

    def pytest_runtest_logreport(self, report):
        # Set-up and tear-down fail a test too; only a call passes it.
        if report.when == "call" or report.outcome != "passed":
            if self.outcomes.get(report.nodeid) != "failed":
                self.outcomes[report.nodeid] = report.outcome
            if report.skipped:
                self.reasons[report.nodeid] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)

    def record(self):
        """Return counts, in all and by folder; failures by name and skips by reason."""
        folders = {}
        for name, outcome in sorted(self.outcomes.items()):
            folders.setdefault(Path(name.split("::")[0]).parent.as_posix(), Counter())[outcome] += 1
        return {
            "tests": dict(sorted(Counter(self.outcomes.values()).items())),
            "by_folder": {folder: dict(sorted(count.items())) for folder, count in folders.items()},
            "failed": sorted(name for name, outcome in self.outcomes.items() if outcome == "failed"),
            "skipped": dict(sorted(Counter(self.reasons.values()).items())),
        }


def heading(kind, version, start):
    """Return what a record of tests begins with: its kind, how to repeat it, where and when, and the seconds since `start`."""
    return {
        "kind": kind,
        "version": version,
        "command": ["python", *sys.argv],
        **gpu_name(),
        "environment": environment(),
        "seconds": round(time.monotonic() - start, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("arguments", nargs="*", help="for pytest, behind --")
    options = parser.parse_args()
    check_writable(options.output)
    start, outcomes = time.monotonic(), Outcomes()
    code = pytest.main(["-q", f"--rootdir={ROOT}", *options.arguments], plugins=[outcomes])
    record = heading(KIND, VERSION, start) | outcomes.record()
    write_text(options.output, dumps(record))
    print(f"{record['tests']}")
    return int(code)


if __name__ == "__main__":
    exit_with(main)
