"""A description of the host, by calls that exist on Linux, macOS and Windows."""

import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from elastickv.backends.cpu import threads
from elastickv.backends.protocol import DeviceInfo

DEFAULT_LAST_LEVEL_CACHE_BYTES = 32 << 20  # if the system does not say: more than most processors have per core complex
DEFAULT_MEMORY_BYTES = 4 << 30  # if the system does not say: refuse rather than swap
_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def describe() -> DeviceInfo:
    """Return the host's description, with documented defaults for what the system does not say."""
    total, free = memory()
    return DeviceInfo(
        kind="cpu",
        name=processor_name(),
        sm=None,
        compute_units=threads.count(),
        theoretical_bw_gbs=None,
        last_level_cache_bytes=last_level_cache_bytes(),
        memory_bytes=total,
        free_bytes=free,
        driver=None,
    )


def processor_name() -> str:
    """Return the processor's marketing name where the system knows one."""
    for key, value in _pairs(Path("/proc/cpuinfo")):
        if key == "model name":
            return value
    return platform.processor() or platform.machine() or "unknown processor"


def last_level_cache_bytes() -> int:
    """Return the size of the largest cache of the first processor, or 32 MiB if the system does not say."""
    sizes = [_size(path) for path in _CPU_CACHES.glob("index*/size")]
    return max(sizes, default=0) or DEFAULT_LAST_LEVEL_CACHE_BYTES


def memory() -> tuple[int, int]:
    """Return the total and the available bytes of memory."""
    linux = {key: int(value.split()[0]) << 10 for key, value in _pairs(Path("/proc/meminfo")) if value.endswith("kB")}
    if "MemTotal" in linux:
        return linux["MemTotal"], linux.get("MemAvailable", linux["MemTotal"])
    if os.name == "nt":
        return _windows_memory()
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        total = DEFAULT_MEMORY_BYTES
    # On macOS the available memory needs a Mach call: half is a safe guess.
    return total, total // 2


def _windows_memory() -> tuple[int, int]:
    class Status(ctypes.Structure):
        """MEMORYSTATUSEX of the Windows API."""

        _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32)] + [
            (name, ctypes.c_uint64)
            for name in ("total", "available", "page_total", "page_free", "virtual_total", "virtual_free", "extended")
        ]

    status = Status()
    status.length = ctypes.sizeof(Status)
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # type: ignore[attr-defined,unused-ignore]
        return DEFAULT_MEMORY_BYTES, DEFAULT_MEMORY_BYTES // 2
    return int(status.total), int(status.available)


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the 'key: value' lines of a file; none if there is no such file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            yield key.strip(), value.strip()


def _size(path: Path) -> int:
    try:
        text = path.read_text(encoding="ascii").strip()
        return int(text[:-1]) * _UNITS[text[-1]] if text[-1:] in _UNITS else int(text)
    except (OSError, ValueError):
        return 0
