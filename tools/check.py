"""Run every check in one command, with nothing but Python 3.10 or newer: `python3 tools/check.py`.

Creates a virtual environment in .venv-check, installs nox into it and runs the sessions of noxfile.py there: `install` (the
package and its test tools; meanwhile the quick tests with another Python, where there is one), `lint`, `format`, `types`,
`tests` and `package`. Stops at the first failure. With --here the checks run in the environment of the Python that runs this
file. All other arguments go to pytest: `tools/check.py --here -k recipe`.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv-check"
CHECKS = ["lint", "format", "types", "tests"]


def fresh_environment(folder: Path) -> Path:
    """Create a virtual environment and return the path of its Python."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def nox_requirement() -> str:
    """Return the requirement of nox in pyproject.toml, which Python 3.10 has no parser for."""
    match = re.search(r'"(nox\b[^"]*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert match
    return match[1]


def nox_command(python: str, here: bool, pytest_arguments: "list[str]") -> "list[str]":
    """Return the command that runs the sessions.

    Parameters
    ----------
    python : of the environment to check in; nox is installed there.
    here : whether the package and its test tools are installed there already.
    pytest_arguments : if there are any, only the checks of the checkout run: no other Python, no wheel.
    """
    sessions = CHECKS if here else ["install", *CHECKS]
    if not here and not pytest_arguments:
        sessions = [*sessions, "package"]
    return [python, "-m", "nox", "--noxfile", str(ROOT / "noxfile.py"), "--sessions", *sessions, "--", *pytest_arguments]


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036  (an older Python, from 3.7 on, can run this file up to here)
        version = sys.version.split()[0]
        print(f"Python 3.10 or newer is needed, this is {version}: start this with a newer one", file=sys.stderr)
        return 2
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(
        usage="check.py [-h] [--here] [arguments of pytest]", description=description, allow_abbrev=False
    )
    parser.add_argument("--here", action="store_true", help="use this Python's environment; install nothing")
    options, pytest_arguments = parser.parse_known_args()
    if pytest_arguments[:1] == ["--"]:
        del pytest_arguments[0]
    python = sys.executable
    if options.here:
        if find_spec("nox") is None:
            print('nox is not installed here: python -m pip install -e ".[test]"', file=sys.stderr)
            return 2
    else:
        print(f"==> environment: {ENVIRONMENT}", flush=True)
        python = str(fresh_environment(ENVIRONMENT))
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-compile", nox_requirement()], check=True)
    return subprocess.call(nox_command(python, options.here, pytest_arguments), cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
