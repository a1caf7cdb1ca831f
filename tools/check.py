"""Everything that has to pass, in one command, with nothing but Python 3.10 or newer: `python3 tools/check.py`.

Makes a fresh virtual environment in .venv-check, installs the package and its test tools into it, and runs lint, format
check, types and tests; where another Python from 3.10 on is at hand (the newest counts), a quick part of the tests runs with
that one, while the rest is installed. Stops after what fails, with its exit code. With --here it uses the Python that runs it
and the environment that Python has, and no other.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Chain = list[tuple[str, list[str]]]
    Stage = list[Chain]

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT, OTHER_ENVIRONMENT = ROOT / ".venv-check", ROOT / ".venv-check-other"
WORKERS = 2
MINORS = range(14, 9, -1)
# What no other Python should change: seconds, and nothing but the package, pytest, hypothesis and jsonschema.
QUICK = [
    "tests/kvcache", "tests/benchmark/test_sample_inputs.py", "tests/recipe/test_recipe.py", "tests/recipe/test_byte_counts.py",
    "tests/benchmark/test_gate.py", "tests/benchmark/stats/test_location.py", "tests/benchmark/test_sampler.py",
    "tests/benchmark/stats/test_intervals.py", "tests/benchmark/test_telemetry.py", "tests/results/test_comparison.py",
]  # fmt: skip
# What is imported is compiled then, and most of it never is.
INSTALL = ["pip", "install", "--quiet", "--no-compile"]
SHORT_RUN = ["bench", "--preset", "short", "--paired-baseline", "--time-limit", "5", "--backend", "cpu"]


def python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fresh_environment(folder: Path, base: str = sys.executable) -> Path:
    """Return the Python of a new virtual environment of the interpreter `base`."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([base, "-m", "venv", str(folder)], check=True)
    return python_of(folder)


def another_python() -> str | None:
    """Return the newest Python from 3.10 on, other than this one's version, that starts: on PATH, or pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for minor in MINORS:
        if minor == sys.version_info.minor:
            continue
        found = [shutil.which(f"python3.{minor}"), *map(str, sorted(pyenv.glob(f"3.{minor}.*/bin/python")))]
        for candidate in filter(None, found):
            # A shim may stand for none; a distribution's may lack venv.
            test = [candidate, "-c", f"import sys, ensurepip, venv; sys.exit(sys.version_info.minor != {minor})"]
            if subprocess.run(test, capture_output=True, check=False).returncode == 0:
                return candidate
    return None


def plan(python: Path, other: Path | None, install: bool, tests: list[str]) -> list[Stage]:
    """Return the stages, one after the other; the chains of a stage run side by side, the steps of a chain in order.

    Parameters
    ----------
    python : of the environment that everything runs in.
    other : of an environment of another Python, for the quick part; None for none.
    install : whether the environments are empty yet.
    tests : what pytest is told beyond the usual.
    """
    module, other_module = [str(python), "-m"], [str(other), "-m"]
    begin: Stage = [[("install", [*module, *INSTALL, ".[test]"])]] if install else []
    if other is not None:
        # While the larger installation has most of its time to wait.
        quick = [*other_module, *INSTALL, ".", "pytest", "hypothesis", "jsonschema"]
        begin.append([
            ("install for another Python", quick),
            ("quick tests with another Python", [*other_module, "pytest", "-q", *QUICK]),
            ("short run with another Python", [*other_module, "elastickv", *SHORT_RUN]),
        ])  # fmt: skip
    stages: list[Stage] = [
        begin,
        [
            [("lint", [*module, "ruff", "check"])],
            [("format", [*module, "ruff", "format", "--check"])],
            [("types", [*module, "mypy"])],
        ],
        [[("tests", [*module, "pytest", "-q", "-n", str(WORKERS), "--dist", "loadfile", *tests])]],
    ]
    if install and not tests and (ROOT / ".git").exists():
        stages.append([[("package", [str(python), "tools/package.py", "--no-install"])]])
    return [stage for stage in stages if stage]


def run(stage: Stage) -> int:
    """Run chains side by side and print what their steps say, a lone one's as it comes; return the first code that is not 0."""
    if len(stage) == 1:
        return follow(stage[0], capture=False)
    with ThreadPoolExecutor(len(stage)) as pool:
        codes = list(pool.map(follow, stage))
    return next(filter(None, codes), 0)


def follow(chain: Chain, capture: bool = True) -> int:
    """Run steps until one fails; return its code. What is captured is printed when its step has ended."""
    for name, command in chain:
        say(f"==> {name}: {' '.join(command[1:])}")
        start = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, capture_output=capture, check=False)
        if capture:
            sys.stdout.buffer.write(b"".join([f"==> {name}\n".encode(), done.stdout, done.stderr]))
            sys.stdout.flush()
        how = "passed" if done.returncode == 0 else f"FAILED ({done.returncode})"
        say(f"    {name} {how} after {time.monotonic() - start:.0f} s")
        if done.returncode:
            return done.returncode
    return 0


def say(line: str) -> None:
    """Print a line as a whole, for others print beside it."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036  (the one file that an older Python, from 3.7 on, may start)
        print(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}: start this with a newer one", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--here", action="store_true", help="use this Python's environment; install nothing")
    options, tests = parser.parse_known_args()
    python, other = Path(sys.executable), None
    if not options.here:
        say(f"==> environment: {ENVIRONMENT}")
        python = fresh_environment(ENVIRONMENT)
        found = None if tests else another_python()
        say(f"==> another Python: {found or 'none is at hand'}")
        other = None if found is None else fresh_environment(OTHER_ENVIRONMENT, found)
    for stage in plan(python, other, not options.here, tests):
        code = run(stage)
        if code:
            return code
    say("==> everything passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
