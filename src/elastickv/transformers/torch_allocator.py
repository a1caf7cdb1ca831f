"""PyTorch's memory for a backend on the same GPU."""

from __future__ import annotations

import torch


class _Memory:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self.pointer, self.n_bytes = tensor, tensor.data_ptr(), tensor.nbytes


class TorchAllocator:
    """PyTorch's caching allocator: it counts what a cache holds, and reuses what a prompt has freed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, n_bytes: int) -> _Memory:
        """Allocate, for use on the present stream."""
        return _Memory(torch.empty(-(-n_bytes // 16) * 16, dtype=torch.uint8, device=self._device))

    def free_bytes(self) -> int:
        """Return what the driver has left, plus what PyTorch has reserved and does not use."""
        unused: int = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return unused + int(torch.cuda.mem_get_info(self._device)[0])
