"""How much memory some work takes, beside work of others."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5), clear_refs


class Footprint:
    """What the watched stretches of work hold between them, and the most that they held at once.

    On CUDA PyTorch's allocator tells. On Linux it is the process's resident memory. Elsewhere no peak can be started anew, and
    nothing is told.

    Attributes
    ----------
    source : 'torch allocator', 'resident memory' or None.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held = self._peak = 0
        self._began = False
        self.source = "torch allocator" if device.type == "cuda" else "resident memory" if _resettable() else None

    @property
    def peak_bytes(self) -> int | None:
        """The most held at once; None where nothing tells."""
        return None if self.source is None else self._peak

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count what is allocated and freed from here to the end of the block."""
        if self.source is None:
            yield
            return
        if not self._began:
            self._began = True
            _give_back()
        self._reset()
        before = self._now()
        try:
            yield
        finally:
            self._peak = max(self._peak, self._held + self._most() - before)
            self._held += self._now() - before

    def _reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")

    def _now(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else _status("VmRSS")

    def _most(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _status("VmHWM")


def _give_back() -> None:
    """Hand freed memory back to the system: it would be taken again unseen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _resettable() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
        return _status("VmHWM") > 0
    except OSError:
        return False


def _status(name: str) -> int:
    """Return bytes that the system tells of this process; 0 where it does not."""
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    return int(found[1]) << 10 if found else 0
