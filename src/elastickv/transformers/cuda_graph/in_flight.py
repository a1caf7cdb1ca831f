"""Decodes that were launched ahead, on a stream of their own: whoever else decodes on a device is queued behind them.

A decode spreads over all multiprocessors, and its blocks wait for each other: two at once could each hold what the other needs.
"""

from __future__ import annotations

import torch

_ends: dict[torch.device, torch.cuda.Event] = {}


def note_in_flight(device: torch.device, end: torch.cuda.Event) -> None:
    """Note a decode by the event of its end."""
    _ends[device] = end


def wait_for_others(device: torch.device, host: bool = False) -> None:
    """Let what is queued on PyTorch's present stream from here on, or the host, wait for what is under way on a device."""
    end = _ends.get(device)
    if end is None:
        return
    if host:
        end.synchronize()
    if end.query():
        _ends.pop(device, None)
    else:
        end.wait(torch.cuda.current_stream(device))
