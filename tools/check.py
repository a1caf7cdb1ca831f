"""Everything that has to pass, in one command, with nothing but Python 3.10 or newer: `python3 tools/check.py`.

Makes a fresh virtual environment in .venv-check, installs the package and its test tools into it, and runs lint, format
check, types and tests; then, where another Python from 3.10 on is at hand (the newest counts), a quick part of the tests with
that one; stops at the first that fails, with its exit code. With --here it uses the Python that runs it and the environment
that Python has, and no other.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

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


def quick_steps(base: str) -> list[tuple[str, list[str]]]:
    module = [str(fresh_environment(OTHER_ENVIRONMENT, base)), "-m"]
    return [
        ("install", [*module, "pip", "install", "--quiet", ".", "pytest", "hypothesis", "jsonschema"]),
        ("quick tests", [*module, "pytest", "-q", *QUICK]),
        ("short run", [*module, "elastickv", *SHORT_RUN]),
    ]


def steps(python: Path, install: bool, tests: list[str]) -> list[tuple[str, list[str]]]:
    module = [str(python), "-m"]
    all_steps = [
        ("install", [*module, "pip", "install", "--quiet", ".[test]"]),
        ("lint", [*module, "ruff", "check"]),
        ("format", [*module, "ruff", "format", "--check"]),
        ("types", [*module, "mypy"]),
        ("tests", [*module, "pytest", "-q", "-n", str(WORKERS), *tests]),
    ]
    return all_steps if install else all_steps[1:]


def run(name: str, command: list[str]) -> int:
    print(f"==> {name}: {' '.join(command[1:])}", flush=True)
    start = time.monotonic()
    code = subprocess.call(command, cwd=ROOT)
    print(f"    {name} {'passed' if code == 0 else f'FAILED ({code})'} after {time.monotonic() - start:.0f} s", flush=True)
    return code


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036  (the one file that an older Python may start)
        print(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}: start this with a newer one", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--here", action="store_true", help="use this Python's environment; install nothing")
    options, tests = parser.parse_known_args()
    python = Path(sys.executable)
    if not options.here:
        print(f"==> environment: {ENVIRONMENT}", flush=True)
        python = fresh_environment(ENVIRONMENT)
    planned = steps(python, not options.here, tests)
    if not options.here and not tests:
        if (ROOT / ".git").exists():
            planned.append(("package", [str(python), "tools/package.py", "--no-install"]))
        other = another_python()
        print(f"==> another Python: {other or 'none is at hand'}", flush=True)
        planned += quick_steps(other) if other else []
    for name, command in planned:
        code = run(name, command)
        if code:
            return code
    print("==> everything passed", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
