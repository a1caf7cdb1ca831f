"""Everything that has to pass, in one command, with nothing but Python 3.10 or newer: `python3 tools/check.py`.

Makes a fresh virtual environment in .venv-check, installs the package and its test tools into it, and runs lint, format
check, types and tests; stops at the first that fails, with its exit code. With --here it uses the Python that runs it and
the environment that Python has.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv-check"
WORKERS = 2


def python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


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
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        venv.create(ENVIRONMENT, with_pip=True)
        python = python_of(ENVIRONMENT)
    for name, command in steps(python, not options.here, tests):
        code = run(name, command)
        if code:
            return code
    print("==> everything passed", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
