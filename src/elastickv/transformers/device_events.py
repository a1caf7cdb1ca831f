"""Timestamps of queued device work. On CUDA they are events, because the host runs ahead of the device."""

from __future__ import annotations

import time
from typing import TypeAlias

import torch
from torch.cuda.streams import Event

Timestamp: TypeAlias = float | Event


def now(device: torch.device) -> Timestamp:
    """Return the time at which a device reaches this point of its queue."""
    if device.type != "cuda":
        return time.perf_counter()
    with torch.cuda.device(device):
        event = Event(enable_timing=True)
        event.record()
    return event


def on_one_clock(first: Timestamp, last: Timestamp) -> bool:
    """Whether two timestamps come from the same device."""
    return getattr(first, "device", None) == getattr(last, "device", None)


def seconds(first: Timestamp, last: Timestamp) -> float:
    """Return the seconds between two timestamps of one device. Waits for the last."""
    if isinstance(first, Event):
        assert isinstance(last, Event)
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3
    assert not isinstance(last, Event)
    return last - first
