"""Between torch tensors and a backend's cache of one layer: tensors become what `LayerCache` takes, on any device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from elastickv.backends import Backend, load
from elastickv.errors import UsageError
from elastickv.kvcache import LayerCache, TensorView
from elastickv.kvcache.gptq import layer_compensation
from elastickv.kvcache.protocol import CacheState
from elastickv.recipe import AttentionShape, Recipe
from elastickv.recipe.calibration import StorageStatistics
from elastickv.transformers.cuda_graph.in_flight import wait_for_others
from elastickv.transformers.key_smoothing import KeySmoothing
from elastickv.transformers.torch_allocator import TorchAllocator
from elastickv.transformers.torch_dtypes import DTYPE_NAMES, TORCH_DTYPES

if TYPE_CHECKING:
    from typing_extensions import Self

GIB = 1 << 30
NOTHING_KNOWN = StorageStatistics()


def backend_for(device: torch.device) -> Backend:
    """Return a backend for layers whose tensors are on `device`. On a GPU it shares the device and the memory with PyTorch.

    Raises
    ------
    UsageError : if there is none, or it cannot run here.
    """
    if device.type == "cpu":
        return load("cpu")[0]
    if device.type == "cuda":
        with torch.cuda.device(device):
            return load("cuda", torch.cuda.current_device(), TorchAllocator(device))[0]
    raise UsageError(f"layers on {device} are not supported: move the model to cpu or cuda")


class Backends:
    """The backends of one model cache's layers, one for each device.

    Attributes
    ----------
    uses : how often stores were used by anything but the next decode.
    in_flight : a decode that was launched before its call and must be rolled back on any other use, or None.
    """

    def __init__(self) -> None:
        self._opened: dict[torch.device, Backend] = {}
        self.uses = 0
        self.in_flight: InFlightDecode | None = None

    def at(self, device: torch.device) -> Backend:
        """Return the backend of a device; see `backend_for`."""
        if device not in self._opened:
            self._opened[device] = backend_for(device)
        return self._opened[device]

    def note_use(self) -> None:
        """Count a use; a decode that was launched before its call is rolled back first."""
        self.uses += 1
        if self.in_flight is not None:
            decode, self.in_flight = self.in_flight, None
            decode.rollback()


class InFlightDecode(Protocol):
    """A decode of a whole model that was launched before its call."""

    def rollback(self) -> None:
        """Enqueue what restores the stores to their state before the decode."""

    def wait(self) -> None:
        """Wait until it has run."""


def new_store(
    backends: Backends,
    shape: AttentionShape,
    capacity: int,
    dtype: str,
    recipe: Recipe,
    head_dim: int,
    device: torch.device,
    anchor_offset: int = 0,
    statistics: StorageStatistics = NOTHING_KNOWN,
) -> LayerStorage:
    """Return an empty store.

    Parameters
    ----------
    shape : of the layer, with the padded head.
    head_dim : the model's own.
    anchor_offset : steps by which the layer's anchors come early.
    statistics : of these KV heads; see `ModelCalibration`.

    Raises
    ------
    UsageError : as `Backend.cache`; if the recipe needs what the calibration does not have.
    """
    backend = backends.at(device)
    with _on_current_stream(backend, device):
        compensation = layer_compensation(recipe, shape.head_dim, statistics)
        cache = backend.cache(shape, capacity, dtype, recipe, anchor_offset, compensation)
        smoothing = statistics.smoothing
        smooth = KeySmoothing(smoothing, device) if smoothing is not None and recipe.rotates_keys else None
        if smooth is not None:
            smooth.factors(TORCH_DTYPES[dtype])
        return LayerStorage(backends, backend, cache, head_dim, device, smooth)


def _on_current_stream(backend: Backend, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which `device` is current, after letting the backend follow PyTorch's current stream."""
    if device.type != "cuda":
        return nullcontext()
    backend.follow(torch.cuda.current_stream(device).cuda_stream)
    wait_for_others(device)
    context: AbstractContextManager[Any] = torch.cuda.device(device)
    return context


def check_room(backend: Backend, shape: AttentionShape, capacity: int, dtype: str, recipe: Recipe) -> None:
    """Raise UsageError if a layer's cache does not fit the free memory."""
    needed, free = backend.cache_bytes(shape, capacity, dtype, recipe), backend.device.free_bytes
    if needed > free:
        raise UsageError(
            f"a layer's cache of {capacity} tokens needs {needed / GIB:.2f} GiB and {free / GIB:.2f} GiB are free: "
            "generate fewer tokens, or give a larger compress"
        )


class LayerStorage:
    """The tokens of one layer in a backend's cache, as torch tensors.

    Tensors are (batch, kv_heads, tokens, head_dim) of the model's dtype; what is read back is float32 on the layer's device.
    On a GPU all work is enqueued on PyTorch's current stream.
    """

    def __init__(
        self,
        backends: Backends,
        backend: Backend,
        cache: LayerCache,
        head_dim: int,
        device: torch.device,
        smoothing: KeySmoothing | None = None,
    ) -> None:
        self._backends, self._backend, self.head_dim, self._device = backends, backend, head_dim, device
        self._smoothing = smoothing
        self._replace(cache)

    def __del__(self) -> None:
        # A decode that was launched before its call still writes to memory that is about to be reused.
        backends = getattr(self, "_backends", None)
        if backends is not None and backends.in_flight is not None:
            backends.in_flight.wait()

    def _replace(self, cache: LayerCache) -> None:
        self.cache = cache
        shape, dtype = self.cache.shape, torch.float32 if self.on_host else TORCH_DTYPES[self.cache.dtype]
        heads = (shape.batch, shape.query_heads)
        self._one = np.ones(shape.batch, np.int64)
        self._outputs = torch.empty((*heads, shape.head_dim), dtype=dtype, device=self._device)
        self._lse = torch.empty(heads, dtype=torch.float32, device=self._device)

    def _in_use(self) -> AbstractContextManager[Any]:
        """Return a context in which the cache may be used by anything but a decode launched before its call."""
        self._backends.note_use()
        return _on_current_stream(self._backend, self._device)

    @property
    def on_host(self) -> bool:
        """Whether work has run on return, so that the host need not wait for it."""
        return bool(self._device.type == "cpu")

    @property
    def backend_name(self) -> str:
        """Name of the backend that holds the tokens."""
        return self._backend.name

    @property
    def device(self) -> torch.device:
        """Where the tokens lie."""
        return self._device

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens held of each row, (batch,)."""
        return self.cache.lengths

    @property
    def launch_key(self) -> Hashable:
        """Changes whenever a captured graph of `enqueue_step` is no longer valid."""
        return self.cache.launch_key, self._outputs.data_ptr()

    @property
    def room(self) -> int:
        """Tokens that every row can still take without a change of `launch_key`."""
        return self.cache.room

    def extend(self, keys: torch.Tensor, values: torch.Tensor, lengths: NDArray[np.int64]) -> None:
        """Store a prompt or a further chunk, of row b the first `lengths[b]` tokens; the next decode is an anchor."""
        with self._in_use():
            self._grow(lengths)
            keys, values = _of_one_dtype(keys if self._smoothing is None else self._smoothing.keys(keys), values)
            self.cache.extend(_view(keys), _view(values), lengths)

    def read(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens `first` to `last` - 1 as stored, float32; zeros where there are none."""
        shape = (self.cache.shape.batch, self.cache.shape.kv_heads, max(last - first, 0), self.head_dim)
        keys, values = (torch.empty(shape, dtype=torch.float32, device=self._device) for _ in range(2))
        with self._in_use():
            self.cache.read(first, last, (_view(keys), _view(values)))
        return keys if self._smoothing is None else self._smoothing.stored_keys(keys), values

    def prepare_step(self) -> None:
        """Make room for one more token a row, and check that it can be decoded."""
        if not self.cache.room:
            self._grow(self._one)
        self.cache.prepare_step()

    def enqueue_step(
        self, keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one token a row and attend with one query a row, between `prepare_step` and `commit_step`.

        Parameters
        ----------
        keys, values : (batch, kv_heads, 1, head_dim).
        queries : (batch, query_heads, head_dim).
        scaling : factor of the products of queries and keys.

        Returns
        -------
        outputs : (batch, query_heads, head_dim), float32 or the model's dtype; valid until the next step.
        lse : (batch, query_heads) float32, natural logarithm.
        """
        if self._smoothing is not None:
            keys, queries = self._smoothing.keys(keys), self._smoothing.queries(queries)
        token_keys, token_values, queries = _of_one_dtype(keys[:, :, 0], values[:, :, 0], queries)
        inputs = (_view(token_keys), _view(token_values), _view(queries))
        # Backends divide by the root of the padded head.
        scale = scaling * self.cache.shape.head_dim**0.5
        with self._in_use():
            self.cache.enqueue_step(*inputs, scale, _view(self._outputs), _view(self._lse))
        return self._outputs[..., : self.head_dim], self._lse

    def commit_step(self) -> None:
        """Count the token of the enqueued step."""
        self.cache.commit_step()

    def rollback_step(self) -> None:
        """Undo an enqueued step that was not committed; it can then be enqueued again."""
        with _on_current_stream(self._backend, self._device):
            self.cache.rollback_step()

    def _grow(self, more: NDArray[np.int64]) -> None:
        needed = int((self.lengths + more).max())
        if needed > self.cache.capacity:
            # An eighth more: it is copied rarely, and little memory is unused.
            capacity = _rounded(needed + max(needed // 8, 256))
            with self._in_use():
                check_room(self._backend, self.cache.shape, capacity, self.cache.dtype, self.cache.recipe)
                self._replace(self.cache.gather(np.arange(self.cache.shape.batch), capacity))

    def gather(self, rows: NDArray[np.int64]) -> None:
        """Make row i a copy of row `rows[i]`; the number of rows may change."""
        with self._in_use():
            if len(rows) == self.cache.shape.batch:
                self.cache.reorder(rows)
            else:
                self._replace(self.cache.gather(rows, self.cache.capacity))

    def drop(self, count: NDArray[np.int64]) -> None:
        """Forget the last `count[b]` tokens of row b; see `LayerCache.crop`."""
        with self._in_use():
            self.cache.crop(self.lengths - count)

    def set_fractions(self, fractions: Sequence[float]) -> None:
        """Let decodes read these fractions of the cold pages; see `LayerCache.set_fractions`."""
        with self._in_use():
            self.cache.set_fractions(fractions)

    def raise_non_finite(self) -> None:
        """Raise NonFiniteError if a NaN or infinity was ever stored."""
        with self._in_use():
            self.cache.raise_non_finite()

    def copy(self, backends: Backends) -> Self:
        """Return a store of another model cache that shares nothing with this one."""
        with self._in_use():
            cache = self.cache.gather(np.arange(self.cache.shape.batch), self.cache.capacity)
            return type(self)(backends, self._backend, cache, self.head_dim, self._device, self._smoothing)

    def state(self) -> CacheState:
        """Return copies of all that `load_state` needs."""
        with self._in_use():
            return self.cache.state()

    def load_state(self, state: CacheState) -> None:
        """Replace the contents by what `state` returned; see `LayerCache.load_state`."""
        with self._in_use():
            self.cache.load_state(state)


def _of_one_dtype(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return tensors of one dtype that caches take, each with adjacent channels."""
    dtypes = {tensor.dtype for tensor in tensors}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    dtype = dtype if dtype in DTYPE_NAMES else torch.float32
    return [t if t.stride(-1) == 1 and t.dtype == dtype else t.to(dtype).contiguous() for t in tensors]


def _view(tensor: torch.Tensor) -> TensorView:
    return TensorView(tensor.data_ptr(), DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.stride())


def _rounded(tokens: int) -> int:
    return -(-tokens // 64) * 64
