"""The environment of a result: versions, operating system, processor, commit. Nothing is imported for it."""

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from elastickv.version import __version__

_PACKAGE = Path(__file__).parents[1]
# Name in the record -> distributions that provide it, the first installed one counts.
_DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "numpy": ("numpy",),
    "numba": ("numba",),
    "cuda-core": ("cuda-core",),
    "cuda-bindings": ("cuda-bindings",),
    "nvrtc": ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc"),
    "torch": ("torch",),
    "flashinfer": ("flashinfer-python", "flashinfer"),
}
_GIT_TIMEOUT_S = 10
COMMIT_FILE = "commit.txt"


def environment() -> dict[str, Any]:
    """Return the environment of this process as JSON values; None for what is unknown."""
    return {
        "date_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": package_commit(_PACKAGE),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "os": platform.platform(),
        "cpu": cpu_name(),
        "logical_cpus": os.cpu_count(),
        "threads": _threads(),
        "versions": {"elastickv": __version__} | {name: _version(names) for name, names in _DISTRIBUTIONS.items()},
    }


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Return the processor's product name, or its architecture where the system has no name for it."""
    try:
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in ("model name", "cpu model") and value.strip():
                return value.strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine()
    return platform.processor() or platform.machine() or None


def package_commit(package: Path) -> str | None:
    """Return the commit of the package at `package`, with '+changes' if its checkout has uncommitted changes.

    From git when the package lies in its own checkout, else the commit recorded when it was built, else None.
    """
    # A virtual environment inside another repository must not report that repository's commit.
    if (package.parents[1] / ".git").exists():
        commit = _output(["git", "-C", str(package), "rev-parse", "HEAD"])
        if commit:
            return commit + ("+changes" if _output(["git", "-C", str(package), "status", "--porcelain", "--", "."]) else "")
    try:
        return (package / COMMIT_FILE).read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() or None


def _version(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _threads() -> int | None:
    numba = sys.modules.get("numba")
    if numba is not None and hasattr(numba, "get_num_threads"):
        return int(numba.get_num_threads())
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
