"""Decodes that were launched speculatively, on their own stream: other decodes on the device are queued behind them.

A decode occupies all multiprocessors, and its blocks wait for each other. Two at once could each hold what the other needs.
"""

from __future__ import annotations

import torch

_ends: dict[torch.device, torch.cuda.Event] = {}


def note_in_flight(device: torch.device, end: torch.cuda.Event) -> None:
    """Note a decode by its end event."""
    _ends[device] = end


def wait_for_others(device: torch.device, host: bool = False) -> None:
    """Make later work on PyTorch's present stream, or the host, wait for the decode in flight on a device."""
    end = _ends.get(device)
    if end is None:
        return
    if host:
        end.synchronize()
    if end.query():
        _ends.pop(device, None)
    else:
        end.wait(torch.cuda.current_stream(device))
