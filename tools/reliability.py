"""The table of docs/RELIABILITY.md: each check, the number of cases, the outcome and the command that repeats it."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
HEADERS = ("check", "cases", "outcome", "environment", "command")
FOLDER = "benchmarks/results/reliability"
Row = tuple[str, str, str, str, str]


def reliability() -> list[str]:
    """Return the table, a row for each result file."""
    lines = ["| " + " | ".join(HEADERS) + " |", "|" + "---|" * len(HEADERS)]
    for pattern, read in _READERS.items():
        paths = sorted(RESULTS.glob(pattern))
        if not paths:
            lines.append(f"| {_SUITES.get(pattern, pattern)} | not run yet | | | |")
        for path in paths:
            lines += ["| " + " | ".join(row) + " |" for row in read(json.loads(path.read_text(encoding="utf-8")))]
    return lines


def _where(record: dict[str, Any], device: str | None = None) -> str:
    environment = record.get("environment", record)
    when = str(record.get("date_utc") or environment["date_utc"])[:10]
    driver = f", driver {record['driver']}" if record.get("driver") else ""
    return f"{device or record.get('device') or environment['cpu']}{driver}; {when}, commit {str(environment['commit'])[:7]}"


def _command(command: list[str] | str) -> str:
    if not isinstance(command, str):
        command = " ".join(f'"{part}"' if " " in part else part for part in command)
    return f"`{command}`"


def _number(count: int) -> str:
    return f"{count:,}"


def _tests(count: int) -> str:
    return "1 test" if count == 1 else f"{_number(count)} tests"


def _properties(record: dict[str, Any]) -> Iterator[Row]:
    tried = f"{_number(record['examples'])} generated cases of {record['tests']} property tests"
    yield ("every recipe and backend vs. the float64 reference", tried, f"{record['failures']} failures",
           _where(record), _command(record["command"]))  # fmt: skip


def _mutants(record: dict[str, Any]) -> Iterator[Row]:
    for name, part in record["parts"].items():
        tried = f"{_number(part['tried'])} mutants" + (f", a sample of {_number(part['mutants'])}" if part["sampled"] else "")
        share = f"{100 * part['killed_at_first'] / part['tried']:.1f}"
        share += f" ± {100 * part['standard_error']:.1f} % detected" if part["sampled"] else " % detected"
        if part["killed"] > part["killed_at_first"]:
            share += f", {100 * part['share_killed']:.1f} % with the tests added since"
        said = f"{share}; {part['explained']} of the {part['survived']} survivors are explained"
        yield f"mutation testing: {name}", tried, said, _where(part), _command(part["command"])


def _fuzzing(record: dict[str, Any]) -> Iterator[Row]:
    where = _where(record, f"Python {record['python']}, atheris {record['atheris']}")
    parsers = {name: target for name, target in record["targets"].items() if name != "command-line"}
    program = {name: target for name, target in record["targets"].items() if name == "command-line"}
    for what, targets in ((f"{len(parsers)} parsers", parsers), ("the command line", program)):
        findings = sum(len(target["findings"]) + bool(target["broke"]) for target in targets.values())
        said = f"{findings} findings open" if findings else "only the documented error"
        count = _number(sum(target["executions"] for target in targets.values()))
        yield f"fuzzing of {what}", f"{count} inputs", said, where, _command(record["command"])


def _suite(record: dict[str, Any], check: str) -> Iterator[Row]:
    tests = record["tests"]
    said = f"{_number(tests['passed'])} passed, {tests.get('failed', 0)} failed"
    said += f", {tests['skipped']} skipped (missing hardware or package)" if tests.get("skipped") else ""
    yield (check, _tests(sum(tests.values())), said, _where(record), _command(record["command"]))


def _faults(record: dict[str, Any]) -> Iterator[Row]:
    outcome = {name: sum(fault[name] for fault in record["faults"]) for name in ("passed", "failed", "skipped")}
    said = f"{outcome['passed']} tests passed, {outcome['failed']} failed"
    said += f", {outcome['skipped']} need a GPU or root" if outcome["skipped"] else ""
    yield "fault injection", f"{len(record['faults'])} kinds of fault", said, _where(record), _command(record["command"])


def _sanitizer(record: dict[str, Any]) -> Iterator[Row]:
    runs = Counter(case["tool"] for case in record["cases"])
    clean = Counter(case["tool"] for case in record["cases"] if case["clean"])
    for tool, count in runs.items():
        yield (f"compute-sanitizer: {tool}", f"{count} kernels x recipes", f"{clean[tool]} clean", _where(record),
               f"`python benchmarks/sanitize.py --tools {tool} --output FILE`")  # fmt: skip


def _soak(record: dict[str, Any]) -> Iterator[Row]:
    replays, soaks = record["replays"], record["soak"]
    where, command = _where(record), _command(f"{record['command']} --output FILE")
    differing = sum(row["differing"] for row in replays)
    tried = f"{_number(sum(row['replays'] for row in replays))} replays of the captured steps of {len(replays)} recipes"
    yield "bitwise repeatability", tried, f"{differing} differ in a bit", where, command
    steps, checked = sum(row["steps"] for row in soaks), sum(row["checked_outputs"] for row in soaks)
    most, spread = max(row["largest_error"] for row in soaks), max(row["free_bytes_spread"] for row in soaks)
    said = f"largest error of {_number(checked)} checked outputs {most:.1e}; free device memory changed by {spread} bytes"
    tried = f"{_number(steps)} through {soaks[0]['layers']} layers"
    yield "soak: captured tokens, growing and restarted sequences", tried, said, where, command


def _statistics(record: dict[str, Any]) -> Iterator[Row]:
    for kind, summary in record["summary"].items():
        tried = f"{summary['conditions']} synthetic machines x {_number(record['replications'])}"
        shares = (summary["coverage_mean"], summary["coverage_least"], summary["coverage_most"])
        said = "the 95 % interval contained the true ratio in {:.1f} % ({:.1f} to {:.1f})".format(
            *(100 * share for share in shares)
        )
        if summary["result_says_faster_most"] is not None:
            said += f'; false "faster" in at most {100 * summary["result_says_faster_most"]:.1f} %'
        yield f"intervals: {kind}", tried, said, _where(record, "any machine"), _command(record["command"])


def _aa(record: dict[str, Any]) -> Iterator[Row]:
    count = record["comparisons"]
    said = f'{record["contained_1"]} intervals contained 1.0; false "faster": {record["false_faster"]}'
    yield ("A/A: dense vs. itself", f"{count} comparisons", said, _where(record),
           "`python benchmarks/aa_study.py --backend BACKEND --output FILE`")  # fmt: skip


_SUITES = {
    "h200/suite.json": "the GPU test suite",
    "h200/block_tests.json": "kernels that read block tables",
    "h200/serving_tests-*.json": "the vLLM plug-in on a GPU",
    "h200x2/serving_tests-*.json": "the vLLM plug-in on two GPUs",
}
_READERS: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "reliability/properties.json": _properties,
    "h100/properties.json": _properties,
    "h200/properties.json": _properties,
    **{pattern: partial(_suite, check=check) for pattern, check in _SUITES.items()},
    "reliability/mutation.json": _mutants,
    "reliability/fuzzing.json": _fuzzing,
    "reliability/faults.json": _faults,
    "h100/faults.json": _faults,
    "h100/sanitizer.json": _sanitizer,
    "reliability/soak.json": _soak,
    "reliability/statistics.json": _statistics,
    "cpu/aa_study.json": _aa,
    "h100/aa_study.json": _aa,
}
