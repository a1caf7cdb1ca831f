"""Between torch tensors and a back end's cache of one layer.

The one place where tensors become what a back end takes. `HostStorage` hands over host memory, without a copy where a tensor is
float32 on the CPU; `CudaStorage`, in a file of its own, hands over device addresses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from elastickv.backends import Backend, load
from elastickv.errors import UsageError
from elastickv.kvcache.editable import CacheState, EditableCache
from elastickv.recipe import HEAD_DIMS, AttentionShape, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
GIB = 1 << 30


def padded_head_dim(head_dim: int) -> int:
    """Return the least size of a head, from `head_dim` up, that the kernels are built for; the channels between are zeros.

    Raises
    ------
    UsageError : if the head is larger than any of them.
    """
    fitting = [size for size in HEAD_DIMS if size >= head_dim]
    if not fitting:
        raise UsageError(f"heads of {head_dim} channels are not supported: at most {max(HEAD_DIMS)} are")
    return min(fitting)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the recipe's name of a dtype.

    Raises
    ------
    UsageError : if no kernel stores it.
    """
    if dtype not in DTYPES:
        raise UsageError(f"keys of {dtype} are not supported: load the model in {', '.join(map(str, DTYPES))}")
    return DTYPES[dtype]


def backend_for(device: torch.device) -> Backend:
    """Return a back end that works where a layer's tensors lie. Caches of one such decode one after the other.

    Raises
    ------
    UsageError : if there is none, or it cannot run here.
    """
    if device.type == "cpu":
        return load("cpu")[0]
    if device.type == "cuda":
        from elastickv.transformers.cuda_storage import open_backend

        return open_backend(device)
    raise UsageError(f"layers on {device} are not supported: move the model to cpu or cuda")


class Backends:
    """The back ends of one model cache's layers, one for each device, and who uses what is stored there.

    Attributes
    ----------
    uses : how often stores were used otherwise than by the next decode.
    ahead : what a decode that was launched ahead of its call has to be told when they are, or None.
    """

    def __init__(self) -> None:
        self._opened: dict[torch.device, Backend] = {}
        self.uses = 0
        self.ahead: InFlightDecode | None = None

    def at(self, device: torch.device) -> Backend:
        """Return the back end of a device; see `backend_for`."""
        if device not in self._opened:
            self._opened[device] = backend_for(device)
        return self._opened[device]

    def note_use(self) -> None:
        """Note a use: a decode that was launched ahead is taken back first."""
        self.uses += 1
        if self.ahead is not None:
            ahead, self.ahead = self.ahead, None
            ahead.rollback()


class InFlightDecode(Protocol):
    """A decode of a whole model that was launched before anybody asked for it."""

    def rollback(self) -> None:
        """Let what is queued from here on find the stores as they were before."""

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
) -> LayerStorage:
    """Return an empty store.

    Parameters
    ----------
    shape : of the layer, with the padded head.
    head_dim : the model's own.
    phase : steps by which the layer's anchors come early.
    """
    backend = backends.at(device)
    kind, where = HostStorage, nullcontext()  # type: type[LayerStorage], AbstractContextManager[Any]
    if backend.name == "cuda":
        from elastickv.transformers.cuda_storage import CudaStorage, on_present_stream

        kind, where = CudaStorage, on_present_stream(backend, device)
    with where:
        cache = cast(EditableCache, backend.cache(shape, capacity, dtype, recipe, anchor_offset))
        return kind(backends, backend, cache, head_dim, device)


def check_room(backend: Backend, shape: AttentionShape, capacity: int, dtype: str, recipe: Recipe) -> None:
    """Raise UsageError if the memory that is free does not hold a layer's cache."""
    needed, free = backend.cache_bytes(shape, capacity, dtype, recipe), backend.device.free_bytes
    if needed > free:
        raise UsageError(
            f"a layer's cache of {capacity} tokens needs {needed / GIB:.2f} GiB and {free / GIB:.2f} GiB are free: "
            "generate fewer tokens, or give a larger compress"
        )


class LayerStorage(ABC):
    """The tokens of one layer in a back end's cache.

    Tensors are (batch, kv_heads, tokens, head_dim) of the model's dtype; what is read back is float32 on the layer's device.

    Attributes
    ----------
    on_host : whether the host need not wait for what is stored.
    """

    on_host = False

    def __init__(self, backends: Backends, backend: Backend, cache: EditableCache, head_dim: int, device: torch.device) -> None:
        self._backends, self._backend, self.head_dim, self._device = backends, backend, head_dim, device
        self._replace(lambda: cache)

    def _here(self) -> AbstractContextManager[Any]:
        """Return a context in which the cache may be used otherwise than by a decode."""
        self._backends.note_use()
        return nullcontext()

    @property
    def backend_name(self) -> str:
        """Name of the back end that holds the tokens."""
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
    @abstractmethod
    def launch_key(self) -> Hashable:
        """What a graph of `queue_step` is good for: another key, another graph."""

    @abstractmethod
    def extend(self, keys: torch.Tensor, values: torch.Tensor, lengths: NDArray[np.int64]) -> None:
        """Store further tokens, of row b the first `lengths[b]`; the next decode is an anchor."""

    @abstractmethod
    def read(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens `first` to `last` - 1 as stored, float32; zeros where there are none."""

    def ready_step(self) -> None:
        """Make room for one more token a row."""
        self._grow(self._one)

    @abstractmethod
    def queue_step(
        self, keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one token a row and attend with one query a row, between `ready_step` and `count_step`.

        Parameters
        ----------
        keys, values : (batch, kv_heads, 1, head_dim).
        queries : (batch, query_heads, head_dim).
        scaling : what products of queries and keys are multiplied by.

        Returns
        -------
        outputs : (batch, query_heads, head_dim), float32 or the model's dtype; good until the next step.
        lse : (batch, query_heads) float32, natural logarithm.
        """

    @abstractmethod
    def count_step(self) -> None:
        """Note what `queue_step` stored."""

    @abstractmethod
    def rollback(self) -> None:
        """Undo a `queue_step` that was not counted: repeated, it then does what it would have done."""

    @property
    @abstractmethod
    def spare(self) -> int:
        """Tokens that every row can still take without a change of what `queue_step` queues."""

    def _grow(self, more: NDArray[np.int64]) -> None:
        needed = int((self.lengths + more).max())
        if needed > self.cache.capacity:
            # An eighth more: copied rarely, and little is held that is not used.
            capacity = _rounded(needed + max(needed // 8, 256))
            with self._here():
                check_room(self._backend, self.cache.shape, capacity, self.cache.dtype, self.cache.recipe)
                self._replace(lambda: self.cache.gather(np.arange(self.cache.shape.batch), capacity))

    def gather(self, rows: NDArray[np.int64]) -> None:
        """Take copies of `rows` for rows, as many as there are numbers."""
        with self._here():
            if len(rows) == self.cache.shape.batch:
                self.cache.reorder(rows)
            else:
                self._replace(lambda: self.cache.gather(rows, self.cache.capacity))

    def _replace(self, make: Callable[[], EditableCache]) -> None:
        self.cache = make()
        self._one = np.ones(self.cache.shape.batch, np.int64)

    def drop(self, count: NDArray[np.int64]) -> None:
        """Forget the last `count[b]` tokens of row b; see `EditableCache.crop`."""
        with self._here():
            self.cache.crop(self.lengths - count)

    def set_fractions(self, fractions: Sequence[float]) -> None:
        """Let decodes read these shares of the cold pages; see `EditableCache.set_fractions`."""
        with self._here():
            self.cache.set_fractions(fractions)

    def raise_non_finite(self) -> None:
        """Raise NonFiniteError if a NaN or infinity was ever stored."""
        with self._here():
            self.cache.raise_non_finite()

    def copy(self, backends: Backends) -> Self:
        """Return a store of another model cache that shares nothing with this one."""
        with self._here():
            cache = self.cache.gather(np.arange(self.cache.shape.batch), self.cache.capacity)
            return type(self)(backends, self._backend, cache, self.head_dim, self._device)

    def state(self) -> CacheState:
        """Return copies of all that `load_state` needs."""
        with self._here():
            return self.cache.state()

    def load_state(self, state: CacheState) -> None:
        """Take over what `state` returned; see `EditableCache.load_state`."""
        with self._here():
            self.cache.load_state(state)


class HostStorage(LayerStorage):
    """A store whose cache takes arrays of the host."""

    on_host = True

    @property
    def launch_key(self) -> Hashable:
        return id(self.cache)

    def _host(self, tensor: torch.Tensor) -> NDArray[np.float32]:
        missing = self.cache.shape.head_dim - self.head_dim
        wide = torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor
        return cast("NDArray[np.float32]", wide.detach().to("cpu", torch.float32).contiguous().numpy())

    def _tensor(self, array: NDArray[np.floating]) -> torch.Tensor:
        # A view of the first channels: what was padded is zeros.
        return torch.from_numpy(np.asarray(array, np.float32)).to(self._device)[..., : self.head_dim]

    def extend(self, keys: torch.Tensor, values: torch.Tensor, lengths: NDArray[np.int64]) -> None:
        with self._here():
            self._grow(lengths)
            self.cache.extend(self._host(keys), self._host(values), lengths)

    def queue_step(
        self, keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Back ends divide by the root of the padded head.
        scaled = queries.to(torch.float32) * (scaling * self.cache.shape.head_dim**0.5)
        with self._here():
            self.cache.append(self._host(keys)[:, :, 0], self._host(values)[:, :, 0])
            outputs, lse = self.cache.decode(self._host(scaled))
        return self._tensor(outputs), torch.from_numpy(np.asarray(lse, np.float32)).to(self._device)

    def count_step(self) -> None:
        """Do nothing: the cache has counted what it stored."""

    def rollback(self) -> None:
        """Do nothing: what was stored is counted, and stays."""

    @property
    def spare(self) -> int:
        return self.cache.capacity - int(self.lengths.max(initial=0))

    def read(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.cache.read(first, last)
        return self._tensor(keys), self._tensor(values)


def _rounded(tokens: int) -> int:
    return -(-tokens // 64) * 64
