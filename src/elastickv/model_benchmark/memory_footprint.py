"""How much memory some work takes, beside work of others."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from elastickv.transformers.memory import trim_heap

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5), clear_refs


class Footprint:
    """What the watched stretches of work hold between them, and the most that they held at once.

    On CUDA PyTorch's allocator tells, and of what is taken past it the driver. On Linux it is the process's resident memory.
    Elsewhere no peak can be started anew, and nothing is told.

    Attributes
    ----------
    source : 'torch allocator and driver', 'resident memory' or None.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held = self._peak = 0
        self._began = False
        self.source = "torch allocator and driver" if device.type == "cuda" else "resident memory" if _resettable() else None

    @property
    def peak_bytes(self) -> int | None:
        """The most held at once; None where nothing tells."""
        return None if self.source is None else self._peak

    @property
    def held_bytes(self) -> int | None:
        """What the work holds now; None where nothing tells."""
        return None if self.source is None else self._held

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count what is allocated and freed from here to the end of the block."""
        if self.source is None:
            yield
            return
        if not self._began:
            self._began = True
            give_back(self._device)
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
        if self._device.type != "cuda":
            return _status("VmRSS")
        return int(torch.cuda.memory_allocated(self._device)) + past_allocator(self._device)

    def _most(self) -> int:
        if self._device.type != "cuda":
            return _status("VmHWM")
        # What is taken past the allocator is kept: it is at its most at the end.
        return int(torch.cuda.max_memory_allocated(self._device)) + past_allocator(self._device)


def past_allocator(device: torch.device) -> int:
    """Return the bytes of a CUDA device that are taken past PyTorch's allocator: back ends' caches, code, graphs."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device))


def free_bytes(device: torch.device) -> int:
    """Return the memory that PyTorch can still allocate on a CUDA device, what it keeps for reuse included."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + kept)


def give_back(device: torch.device) -> None:
    """Hand freed memory back to the system: it would be taken again unseen, or be missed where PyTorch does not allocate."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        trim_heap()


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
