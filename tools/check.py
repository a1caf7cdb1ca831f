"""Everything that has to pass, in one command, with nothing but Python 3.10 or newer: `python3 tools/check.py`.

Makes a fresh virtual environment in .venv-check, installs the package and its test tools into it, and runs lint, format
check, types and tests; then, where another Python from 3.10 on is at hand (the newest counts), a quick part of the tests with
that one. What needs no other step runs beside it. Stops after what fails, with its exit code. With --here it uses the Python
that runs it and the environment that Python has, and no other.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Stage = list[tuple[str, list[str]]]

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT, OTHER_ENVIRONMENT = ROOT / ".venv-check", ROOT / ".venv-check-other"
WORKERS = 2
MINORS = range(14, 9, -1)
# What no other Python should change: seconds, and nothing but the package, pytest, hypothesis and jsonschema.
QUICK = [
    "tests/attention", "tests/cache", "tests/data", "tests/recipe/test_recipe.py", "tests/recipe/test_accounting.py",
    "tests/measure/test_gate.py", "tests/measure/test_location.py", "tests/measure/test_sampler.py",
    "tests/measure/test_statistics.py", "tests/measure/test_telemetry.py", "tests/reports/test_comparison.py",
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
    """Return what is run one after the other; the steps of a stage run side by side.

    Parameters
    ----------
    python : of the environment that everything runs in.
    other : of an environment of another Python, for the quick part; None for none.
    install : whether the environments are empty yet.
    tests : what pytest is told beyond the usual.
    """
    module, other_module = [str(python), "-m"], [str(other), "-m"]
    installs, alone = [], [("tests", [*module, "pytest", "-q", "-n", str(WORKERS), "--dist", "loadfile", *tests])]
    ends: Stage = []
    if install:
        installs.append(("install", [*module, *INSTALL, ".[test]"]))
        if not tests and (ROOT / ".git").exists():
            ends.append(("package", [str(python), "tools/package.py", "--no-install"]))
    if other is not None:
        installs.append(("install for another Python", [*other_module, *INSTALL, ".", "pytest", "hypothesis", "jsonschema"]))
        ends.append(("quick tests with another Python", [*other_module, "pytest", "-q", *QUICK]))
        ends.append(("short run with another Python", [*other_module, "elastickv", *SHORT_RUN]))
    lint: Stage = [
        ("lint", [*module, "ruff", "check"]),
        ("format", [*module, "ruff", "format", "--check"]),
        ("types", [*module, "mypy"]),
    ]
    return [stage for stage in (installs, lint, alone, ends) if stage]


def run(stage: Stage) -> int:
    """Run steps side by side and print what each says, a lone one's as it comes; return the first exit code that is not 0."""
    for name, command in stage:
        print(f"==> {name}: {' '.join(command[1:])}", flush=True)
    start = time.monotonic()
    if len(stage) == 1:
        return ended(stage[0][0], subprocess.call(stage[0][1], cwd=ROOT), start)
    with ThreadPoolExecutor(len(stage)) as pool:
        begun = {pool.submit(subprocess.run, c, cwd=ROOT, capture_output=True, check=False): name for name, c in stage}
        codes = []
        for done in as_completed(begun):
            found = done.result()
            print(f"==> {begun[done]}", flush=True)
            for stream in (found.stdout, found.stderr):
                sys.stdout.buffer.write(stream)
            sys.stdout.flush()
            codes.append(ended(begun[done], found.returncode, start))
    return next(filter(None, codes), 0)


def ended(name: str, code: int, start: float) -> int:
    """Print how a step ended, and return its code."""
    print(f"    {name} {'passed' if code == 0 else f'FAILED ({code})'} after {time.monotonic() - start:.0f} s", flush=True)
    return code


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036  (the one file that an older Python, from 3.7 on, may start)
        print(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}: start this with a newer one", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--here", action="store_true", help="use this Python's environment; install nothing")
    options, tests = parser.parse_known_args()
    python, other = Path(sys.executable), None
    if not options.here:
        print(f"==> environment: {ENVIRONMENT}", flush=True)
        python = fresh_environment(ENVIRONMENT)
        found = None if tests else another_python()
        print(f"==> another Python: {found or 'none is at hand'}", flush=True)
        other = None if found is None else fresh_environment(OTHER_ENVIRONMENT, found)
    for stage in plan(python, other, not options.here, tests):
        code = run(stage)
        if code:
            return code
    print("==> everything passed", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
