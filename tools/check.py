"""Run every check in one command, with nothing but Python 3.10 or newer: `python3 tools/check.py`.

Creates a virtual environment in .venv-check, installs nox into it and runs the sessions of noxfile.py there: `install` (the
package and its test tools; meanwhile the quick tests with another Python, where there is one), `lint`, `format`, `types`,
`tests`, `package` and `vllm` (the tests with vLLM on the CPU, in an environment of their own that is installed during the other
checks). Stops at the first failure. With --here the checks run in the environment of the Python that runs this file. All other
arguments go to pytest: `tools/check.py --here -k recipe`. Neither runs `package` and `vllm`.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
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


def nox_command(python: str, *arguments: str) -> "list[str]":
    """Return the command that runs nox, which is installed in the environment of `python`."""
    return [python, "-m", "nox", "--noxfile", str(ROOT / "noxfile.py"), *arguments]


def call(command: "list[str]") -> int:
    """Run a command in the checkout and return its exit code."""
    return subprocess.call(command, cwd=ROOT)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process that `run_all` has started, and what it has started itself."""
    if process.poll() is None:
        if os.name == "nt":
            process.terminate()
        else:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def run_all(python: str) -> int:
    """Run every session in a fresh environment and return the first exit code that is not 0.

    Installing vLLM takes minutes and mostly waits for the network and the disk: it goes on during the other checks, at a low
    priority. What it prints is shown only if it fails.
    """
    install_vllm = nox_command(python, "--session", "vllm", "--install-only")
    if os.name != "nt":
        install_vllm = ["nice", "-n", "10", *install_vllm]
    with tempfile.TemporaryFile() as output:
        installation = subprocess.Popen(
            install_vllm, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=os.name != "nt"
        )
        try:
            code = call(nox_command(python, "--sessions", "install", *CHECKS, "package"))
            if code:
                return code
            code = installation.wait()
            if code:
                output.seek(0)
                sys.stderr.write(output.read().decode(errors="replace"))
                print("the environment of the session vllm could not be installed", file=sys.stderr)
                return code
        finally:
            stop(installation)
    return call(nox_command(python, "-R", "--session", "vllm"))


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
        if not pytest_arguments:
            return run_all(python)
    sessions = CHECKS if options.here else ["install", *CHECKS]
    return call(nox_command(python, "--sessions", *sessions, "--", *pytest_arguments))


if __name__ == "__main__":
    sys.exit(main())
