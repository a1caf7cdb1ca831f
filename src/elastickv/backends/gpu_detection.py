"""Whether this machine has an NVIDIA GPU, with or without software for it."""

import os
from pathlib import Path

_MARKS = (Path("/dev/nvidia0"), Path("/dev/dxg"), Path("/proc/driver/nvidia/version"))


def gpu_present() -> bool:
    """Return whether the operating system shows an NVIDIA device (Linux, WSL) or its driver (Windows)."""
    windows = Path(os.environ.get("SYSTEMROOT", "C:/Windows")) / "System32" / "nvcuda.dll"
    return any(mark.exists() for mark in _MARKS) or (os.name == "nt" and windows.exists())
