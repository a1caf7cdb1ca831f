"""Points in time of the work that is queued on a device: on CUDA the host is ahead of it."""

from __future__ import annotations

import time
from typing import TypeAlias

import torch
from torch.cuda.streams import Event

Moment: TypeAlias = float | Event


def now(device: torch.device) -> Moment:
    """Return the moment at which a device comes to what is queued from here on."""
    if device.type != "cuda":
        return time.perf_counter()
    with torch.cuda.device(device):
        event = Event(enable_timing=True)
        event.record()
    return event


def on_one_clock(first: Moment, last: Moment) -> bool:
    """Whether two moments are of one device."""
    return getattr(first, "device", None) == getattr(last, "device", None)


def seconds(first: Moment, last: Moment) -> float:
    """Return the seconds between two moments of one device; waits for the last."""
    if isinstance(first, Event):
        assert isinstance(last, Event)
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3
    assert not isinstance(last, Event)
    return last - first
