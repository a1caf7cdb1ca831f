"""Do the tests notice when the code is changed? Mutation testing with mutmut, Numba's compiler off.

    pip install '.[test,reliability]'
    python benchmarks/mutation.py statistics --output benchmarks/results/reliability/mutation.json
    python benchmarks/mutation.py recipe cache --sample 300 --output benchmarks/results/reliability/mutation.json

A part that is run replaces its own entry in the file and leaves the others. `--sample` draws so many mutants of every part, by
`--seed`: the share that is killed then has a standard error, which is recorded. Survivors are listed with what was changed and
with the reason why no test can or need tell, where there is one. Where tests were added since and the modules are the same,
`--again` tries the survivors alone; what was killed at first stays in the record, for it alone tells of mutants that were not
drawn, and the standard error is its.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from command_line import exit_with

from elastickv.benchmark.environment import environment

ROOT = Path(__file__).resolve().parents[1]
Record = dict[str, Any]
COPIED = ("src", "tests", "docs", "benchmarks", "pyproject.toml", "README.md")
# Most mutants are noticed by one of the quick tests, and the first test that fails ends a run.
QUICKEST_FIRST = """
import json
from pathlib import Path

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    known = Path(__file__).with_name("mutmut-stats.json")
    if known.exists():
        seconds = json.loads(known.read_text(encoding="utf-8"))["duration_by_test"]
        items.sort(key=lambda item: seconds.get(item.nodeid, 0.0))
"""


@dataclass(frozen=True)
class Part:
    """Modules to be changed, and the quick tests that are theirs."""

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    select: str = ""


_STATISTICS = ("stats/intervals", "stats/location", "stats/changepoint", "sampler", "gate")
_STATISTICS_TESTS = ("stats/test_intervals", "stats/test_location", "stats/test_changepoint", "test_sampler", "test_gate")
PARTS = {
    "statistics": Part(
        tuple(f"src/elastickv/benchmark/{name}.py" for name in _STATISTICS),
        tuple(f"tests/benchmark/{name}.py" for name in _STATISTICS_TESTS),
        "not competing_load",  # a real benchmark, for which kernels that are not compiled are too slow
    ),
    "recipe": Part(("src/elastickv/recipe/*.py",), ("tests/recipe",)),
    "cache": Part(
        ("src/elastickv/kvcache/*.py",),
        (
            "tests/kvcache",
            *(f"tests/backends/test_{name}.py" for name in ("properties", "metamorphic", "non_finite", "editing")),
        ),
        "not cpu and not cuda and not threads",
    ),
}
KILLED = ("killed", "timeout")
# What a changed line looks like, and why no test tells it from the original.
_NO_DTYPE = "no dtype means float64, or that of what is given: the numbers are the same"
_WORDS = "the words of a message"
_BY_CHANCE = "differs where two floats are equal by chance"
_ALL_16_BIT = "whatever a model's dtype, what is not dense keeps its window in 16 bit: the same bytes"
REASONS = (
    (r"hull\[1:\], strict=None", "no strictness is what is written"),
    (r"strict=(None|False)|zip\(.*, \)", "lengths are equal by construction: `strict` only guards that"),
    (r"asarray\((codes|bits|numerator|denominator|series|samples|times), ((dtype=)?None)?\)", _NO_DTYPE),
    (r"(x|near|keys|values|\[exact\])\.astype\(None\)|scaled = .*astype\(None\)", _NO_DTYPE),
    (r"key_format, (None, self\.shape\.head_dim|False, None)\)", "keys have no groups of channels, and None is as False"),
    (r"standard_normal\(.*, (dtype=None)?\)", "seeded normal numbers either way, rounded as they are stored"),
    (r"raise \w+\((None\)|.*(XX|[A-Z]{4,} [A-Z]{2,}))|XX, XX", _WORDS),
    (r"^\+\s+f?\"(XX.*XX|[^a-z]*[A-Z]{4,} [A-Z]{2,}.*|every kv head.*)\"$", _WORDS),  # a line of a message of several
    (r"np\.sort\(\w+, \)", "the last axis is the default"),
    (r"math\.tan\(math\.pi \* \(probability [+-]", "the tangent has the period pi: the same number"),
    (r"if rho == 1:", "of a rho of 0 the formula makes the series itself"),
    (r"pair\[\+1\]", "the last of two is the second"),
    (
        r"np\.clip\(2 \* \(1 - lag / \(2 \* last\)\), None, 1\)",
        "at twice the last lag the window reaches 0, and goes no further",
    ),
    (r"np\.abs\(rho\) > 2 \* math\.sqrt|np\.abs\(deviations\) <= bound|spectrum < 0:|abs\(step\) < _TOL|>= CHANCE", _BY_CHANCE),
    (r"patience, n \+ 1\)", "a lag of as many as there are values has no pairs: it adds nothing"),
    (r"min\(3 \* last, lags\)", "beyond twice the last lag the window is 0"),
    (r"if n <= _FEWEST:", "of 20 samples no order is as unlikely as it must be"),
    (r"kind=\"STABLE\"", "NumPy takes the word in capitals too"),
    (r"late\.add\(None\)", "only whether somebody was late is asked"),
    (r"_turn\(.*\) < 0:", "points on a line are one piece, or two of one slope that are taken one after the other"),
    (r"row\[0\]\[2:-1\]", "behind the bracket stands the end of a line, which is dropped anyway"),
    (r"stored_ratio\(recipe, \[MAX_CONTEXT\], head, \)|\[context\], shape, \)", _ALL_16_BIT),
    (r"for_ratio\(ratio, context, shape, \*\*overrides\)", _ALL_16_BIT),
    (r"head_dim \+ 2\) if head_dim % n", "no number is divided by the next"),
    (r"\bguess = 1 |for near in \(guess", "where the search begins decides how long it takes, not what it finds"),
    (r"type\(None\) is int", "a shortcut for the most frequent type, which the rest of the line would answer alike"),
    (
        r"np\.where\(divisor >= 0, np\.rint",
        "what was divided by 0 is cast to an int8 of 0 too, by the processors that this runs on",
    ),
    (r"\(direction <= 0\)", "the direction is an infinity, of either sign"),
    (r"slice\(head \* shape\.group, None\)", "what later heads are given by this one is overwritten by their own"),
    (r"_cold\(stored, queries, None", "None begins with the first, as 0 does"),
    (r"if at > x\)", "at a point the lines on both its sides give what it has"),
    (r"AttentionShape\(2, (group|32)", "the batch counts for queries and outputs alone, which are not bytes of the cache"),
    (r"met\(n \+ PAGE_TOKENS - 2\)", "a first look: the tokens around the answer are all asked afterwards"),
)


def workspace(part: Part, folder: Path) -> None:
    """Copy what the tests need, and tell mutmut what to change."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(source, folder / name)
    (folder / "conftest.py").write_text(QUICKEST_FIRST, encoding="utf-8")
    settings = {
        "source_paths": ["src"],
        "only_mutate": list(part.modules),
        "also_copy": ["conftest.py", *(name for name in COPIED if name not in ("src", "tests", "pyproject.toml"))],
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-p", "no:xdist", *(["-k", part.select] if part.select else [])],
        "pytest_add_cli_args_test_selection": list(part.tests),
        "timeout_multiplier": 4.0,
    }
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    with (folder / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write(f"\n[tool.mutmut]\n{lines}use_git_change_detection = false\n")


def mutmut(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of mutmut in a workspace."""
    # With threads, OpenMP would wait for ever in the forks in which mutants run: every mutant would look killed, by its time.
    settings = {"NUMBA_DISABLE_JIT": "1", "HYPOTHESIS_PROFILE": "few", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ | settings, capture_output=True, text=True, check=False)


def refuse(what: str, run: subprocess.CompletedProcess[str]) -> NoReturn:
    """End with the last of what mutmut said: mutants that no test was run against are not survivors."""
    raise SystemExit(f"{what}\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}")


def generate(folder: Path) -> None:
    """Make all mutants, run the tests once without one, and stop: mutmut ends where it looks for a mutant that is not there."""
    nobody = "no such mutant"
    run = mutmut(folder, "run", nobody)
    if nobody not in run.stderr:
        refuse("the tests do not pass without a mutant: do they in this environment, with NUMBA_DISABLE_JIT=1?", run)


def run_tests(folder: Path, chosen: list[str], workers: int) -> dict[str, str]:
    """Run the tests against mutants and return what became of each.

    mutmut first runs the tests without a mutant, then with one in which everything fails: where they do not notice it, it ends
    with an error, for then it is not the changed modules that they import.
    """
    run = mutmut(folder, "run", "--max-children", str(workers), *chosen)
    status_of = statuses(folder)
    outcome = {mutant: status_of[mutant] for mutant in chosen}
    if run.returncode or "not checked" in outcome.values():
        refuse("mutmut did not try every mutant", run)
    return outcome


def statuses(folder: Path) -> dict[str, str]:
    """Return what became of every mutant."""
    lines = (line.strip().rpartition(": ") for line in mutmut(folder, "results", "--all", "true").stdout.splitlines())
    return {name: status for name, _, status in lines if "__mutmut_" in name}


def changed(folder: Path, mutant: str) -> str:
    """Return the lines as a mutant has them."""
    lines = mutmut(folder, "show", mutant).stdout.splitlines()
    return "\n".join(line for line in lines if line.startswith("+") and not line.startswith("+++"))


def reason(change: str) -> str:
    """Return why a survivor is none of the tests' business, or that it is open."""
    return next((why for pattern, why in REASONS if re.search(pattern, change)), "open: no test tells it")


def explained(survivors: list[dict[str, str]]) -> int:
    """Return how many survivors have a reason to be."""
    return sum(not survivor["reason"].startswith("open") for survivor in survivors)


def write(record: Record, output: Path) -> None:
    """Write the file anew."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def tested(part: Part, sample: int | None, seed: int, workers: int, known: Record | None) -> Record:
    """Return what the tests of a part do with its mutants: all of them, a sample, or those that a record has as survivors."""
    start, where = time.monotonic(), environment()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workspace(part, folder)
        generate(folder)
        every = sorted(statuses(folder))
        if known:
            chosen = [survivor["mutant"] for survivor in known["survivors"]]
        else:
            chosen = sorted(random.Random(seed).sample(every, min(sample or len(every), len(every))))
        outcome = run_tests(folder, chosen, workers)
        alive = [mutant for mutant, status in outcome.items() if status not in KILLED]
        with ThreadPoolExecutor(workers) as pool:
            changes = list(pool.map(partial(changed, folder), alive))
        survivors = [
            {"mutant": mutant, "status": outcome[mutant], "change": change, "reason": reason(change)}
            for mutant, change in zip(alive, changes, strict=True)
        ]
    before = known or {"tried": len(chosen), "seed": seed, "seconds": 0, "timeouts": 0}
    tried = before["tried"]
    killed = tried - len(survivors)
    if not killed:
        raise SystemExit("no mutant was killed: do the tests import what was changed?")
    first = before.get("killed_at_first", killed) / tried
    return asdict(part) | {
        "environment": where,
        "mutmut": version("mutmut"),
        "seconds": before["seconds"] + round(time.monotonic() - start),
        "mutants": len(every),
        "tried": tried,
        "sampled": tried < len(every),
        "seed": before["seed"],
        "killed": killed,
        "killed_at_first": known["killed_at_first"] if known else killed,
        "timeouts": before["timeouts"] + Counter(outcome.values())["timeout"],
        "survived": len(survivors),
        "share_killed": killed / tried,
        "standard_error": math.sqrt(first * (1 - first) / tried) if tried < len(every) else 0.0,
        "explained": explained(survivors),
        "survivors": survivors,
    }


def unchanged(part: Part, known: Record) -> Record:
    """Return a record whose modules are still those of today; else its mutants are others, and all must be tried."""
    commit = known["environment"]["commit"]
    if subprocess.run(["git", "diff", "--quiet", commit, "--", *part.modules], cwd=ROOT, check=False).returncode:
        raise SystemExit(f"{', '.join(part.modules)} are not those of commit {commit}: leave out --again")
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(sorted(PARTS))}; none: only give the reasons anew")
    parser.add_argument("--sample", type=int, help="mutants of every part; all of them unless given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--again", action="store_true", help="only the recorded survivors: tests were added, modules are as then"
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    record = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    record |= {"what": "mutants of the code that the tests notice", "parts": record.get("parts", {})}
    for known in record["parts"].values():
        for survivor in known["survivors"]:
            survivor["reason"] = reason(survivor["change"])
        known["explained"] = explained(known["survivors"])
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: choose {', '.join(sorted(PARTS))}")
    for name in arguments.parts:
        known = unchanged(PARTS[name], record["parts"][name]) if arguments.again else None
        counts = tested(PARTS[name], arguments.sample, arguments.seed, arguments.workers, known)
        sampled = f" --sample {arguments.sample} --seed {arguments.seed}" if arguments.sample else ""
        command = f"python benchmarks/mutation.py {name}{sampled} --output benchmarks/results/reliability/mutation.json"
        record["parts"][name] = {"command": known["command"] if known else command} | counts
        write(record, arguments.output)
        print(f"{name}: {counts['killed']} of {counts['tried']} mutants killed, {counts['explained']} survivors explained")
    write(record, arguments.output)


if __name__ == "__main__":
    exit_with(main)
