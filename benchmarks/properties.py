"""How many inputs were tried: the property tests with many more examples than CI gives them, and what they found.

    HYPOTHESIS_PROFILE=nightly python benchmarks/properties.py --output benchmarks/results/reliability/properties.json

Arguments behind `--` go to pytest, such as `-- -n 8 -m "gpu and hypothesis"` on a machine with a GPU. Examples are new ones in
every run; a failure prints how to repeat it. Exit code: pytest's.
"""

import argparse
import json
import os
import re
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from command_line import exit_with
from gpu_name import gpu_name

from elastickv.benchmark.environment import environment

TESTS = (
    *("tests/kvcache", "tests/recipe", "tests/benchmark/stats/test_intervals.py"),
    *(f"tests/backends/test_{name}.py" for name in ("properties", "metamorphic", "non_finite", "stateful")),
)
STATISTICS = "hypothesis statistics"
COUNTS = re.compile(r"(\d+) passing\D*, (\d+) failing\D*, (?:and )?(\d+) invalid")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Send what Hypothesis says of a test along with its report: this module is a plugin of workers, too."""
    item.user_properties.append((STATISTICS, getattr(item, "hypothesis_statistics", "")))


class Counter:
    """A pytest plugin that adds up what Hypothesis says of every test."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, object]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if counted := COUNTS.findall(dict(report.user_properties).get(STATISTICS, "")):
            passed, failed, invalid = (sum(map(int, column)) for column in zip(*counted, strict=True))
            counts = {"examples": passed + failed, "failing": failed, "discarded": invalid}
            self.tests.setdefault(report.nodeid, {}).update(counts)
        if report.failed:
            self.tests.setdefault(report.nodeid, {})["failure"] = report.longreprtext.strip().splitlines()[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("arguments", nargs="*", help="for pytest, behind --")
    options = parser.parse_args()
    profile, counter, start = os.environ.get("HYPOTHESIS_PROFILE", "ci"), Counter(), time.monotonic()
    arguments = options.arguments or ["-m", "hypothesis"]
    code = int(pytest.main(["-q", "-p", Path(__file__).stem, *arguments, *TESTS], plugins=[counter]))
    tests = dict(sorted(counter.tests.items()))
    record = {
        "what": "property tests: examples tried by each, and failures",
        "command": " ".join(
            [f"HYPOTHESIS_PROFILE={profile} python benchmarks/properties.py", f"--output {options.output}"]
            + (["--", *map(repr, options.arguments)] if options.arguments else [])
        ),
        **gpu_name(),
        "environment": environment(),
        "hypothesis": version("hypothesis"),
        "profile": profile,
        "seconds": round(time.monotonic() - start),
        "tests": len(tests),
        "examples": sum(int(str(counts.get("examples", 0))) for counts in tests.values()),
        "failures": sum("failure" in counts for counts in tests.values()),
        "complete": code in (0, 1),  # 2: interrupted, and what was done until then is here
        "by_test": tests,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{record['examples']} examples in {record['tests']} tests, {record['failures']} failures")
    return code


if __name__ == "__main__":
    exit_with(main)
