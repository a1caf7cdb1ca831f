"""Between torch tensors on a GPU and the CUDA back end's cache of one layer: addresses, PyTorch's stream and its memory."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray

from elastickv.backends import Backend
from elastickv.backends.cuda.backend import CudaBackend
from elastickv.backends.cuda.cache import CudaCache
from elastickv.backends.cuda.device_rows import DeviceRows, KeyValueRows
from elastickv.transformers.cuda_graph.in_flight import wait_for_others
from elastickv.transformers.layer_storage import DTYPES, LayerStorage

if TYPE_CHECKING:
    from collections.abc import Callable

    from elastickv.kvcache.editable import EditableCache

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class _Memory:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self.pointer, self.n_bytes = tensor, tensor.data_ptr(), tensor.nbytes


class TorchAllocator:
    """PyTorch's: it counts what a cache holds, and hands out again what a prompt has left behind."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, n_bytes: int) -> _Memory:
        """Allocate, for use on the present stream."""
        return _Memory(torch.empty(-(-n_bytes // 16) * 16, dtype=torch.uint8, device=self._device))

    def free_bytes(self) -> int:
        """Return what the driver has left, and what PyTorch holds unused."""
        held: int = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return held + int(torch.cuda.mem_get_info(self._device)[0])


def open_backend(device: torch.device) -> CudaBackend:
    """Return a back end that shares a device with PyTorch.

    Raises
    ------
    UsageError : if the CUDA back end is not installed, or cannot run there.
    """
    with torch.cuda.device(device):
        return CudaBackend(torch.cuda.current_device(), allocator=TorchAllocator(device))


def on_present_stream(backend: Backend, device: torch.device) -> torch.cuda.device:
    """Return a context in which a device is current, after letting a back end follow PyTorch's present stream."""
    cast(CudaBackend, backend).follow(torch.cuda.current_stream(device).cuda_stream)
    wait_for_others(device)
    return torch.cuda.device(device)


class CudaStorage(LayerStorage):
    """A store whose cache takes addresses. All it does is queued on PyTorch's present stream."""

    cache: CudaCache
    _backend: CudaBackend

    def _replace(self, make: Callable[[], EditableCache]) -> None:
        super()._replace(make)
        shape = self.cache.shape
        heads = (shape.batch, shape.query_heads)
        self._outputs = torch.empty((*heads, shape.head_dim), dtype=TORCH_DTYPES[self.cache.dtype], device=self._device)
        self._lse = torch.empty(heads, dtype=torch.float32, device=self._device)

    def __del__(self) -> None:
        # What was launched ahead on another stream still writes to memory that is about to be handed out again.
        backends = getattr(self, "_backends", None)
        if backends is not None and backends.ahead is not None:
            backends.ahead.wait()

    def _here(self) -> torch.cuda.device:
        self._backends.note_use()
        return self._on_stream()

    def _on_stream(self) -> torch.cuda.device:
        return on_present_stream(self._backend, self._device)

    @property
    def launch_key(self) -> Hashable:
        return self.cache.launch_key, self._outputs.data_ptr()

    def extend(self, keys: torch.Tensor, values: torch.Tensor, lengths: NDArray[np.int64]) -> None:
        with self._here():
            self._grow(lengths)
            self.cache.extend_by(KeyValueRows(*_alike(keys, values)), lengths)

    def ready_step(self) -> None:
        if not self.spare:
            super().ready_step()
        following = self.cache.step + 1
        self.cache.note_decodes(following, following)

    def queue_step(
        self, keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given_keys, given_values, asked = _alike(keys, values, queries.unsqueeze(2))
        # Kernels divide by the root of the padded head.
        scale = scaling * self.cache.shape.head_dim**0.5
        with self._here():
            results = (self._outputs.data_ptr(), self._lse.data_ptr(), self.cache.dtype)
            self.cache.queue_step(KeyValueRows(given_keys, given_values), asked, scale, *results)
        return self._outputs[..., : self.head_dim], self._lse

    def count_step(self) -> None:
        self.cache.count(1)

    @property
    def spare(self) -> int:
        return self.cache.capacity - self.cache.longest

    def rollback(self) -> None:
        with self._on_stream():
            self.cache.rollback()

    def read(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.cache.shape.batch, self.cache.shape.kv_heads, max(last - first, 0), self.head_dim)
        keys, values = (torch.empty(shape, dtype=torch.float32, device=self._device) for _ in range(2))
        with self._here():
            self.cache.read_to(keys.data_ptr(), values.data_ptr(), "fp32", self.head_dim, first, last)
        return keys, values


def _alike(*tensors: torch.Tensor) -> tuple[DeviceRows, ...]:
    """Return where (batch, heads, tokens, head_dim) tensors lie, after giving them one dtype and channels without gaps."""
    dtype = tensors[0].dtype if len({tensor.dtype for tensor in tensors}) == 1 else torch.float32
    dense = [t if t.stride(3) == 1 and t.dtype == dtype else t.to(dtype).contiguous() for t in tensors]
    return tuple(DeviceRows(t.data_ptr(), DTYPES[dtype], t.stride()[:3], t.shape[3]) for t in dense)
