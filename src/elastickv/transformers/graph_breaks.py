"""Where a graph of `torch.compile` breaks: kernels take addresses, and a cache counts on the host."""

from collections.abc import Callable
from typing import TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., object])


def breaks_graph(function: _Function) -> _Function:
    """Let compiled models call a function as it is, between two graphs. Without `torch.compile` nothing changes."""
    disabled: _Function = torch.compiler.disable(function)
    return disabled
