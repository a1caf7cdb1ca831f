"""The part of a cache that serves a model: further chunks, rows that move, crops and saved states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from elastickv.backends.cuda.device import CudaDevice, DeviceMemory, i32, i64
from elastickv.backends.cuda.kernel_selection import TYPES, Variant
from elastickv.backends.cuda.storage import Scratch, Storage
from elastickv.errors import UsageError
from elastickv.kvcache.checked_cache import CheckedCache
from elastickv.kvcache.checks import check_fractions, check_lists, cold_tokens
from elastickv.kvcache.protocol import CacheState, Lengths
from elastickv.kvcache.tensor_view import Float32, Tensor, TensorView
from elastickv.recipe import PAGE_TOKENS, Recipe
from elastickv.recipe.regions import retained_tokens

if TYPE_CHECKING:
    from typing_extensions import Self

_STAGED_BYTES = 1 << 28  # of keys, and of values, that are on their way from the host at once
_BLOCKS = 4096
_COPY_BLOCKS = 64
_NUMBERS = ("lengths", "clock", "fractions", "arrangement")  # what `state` tells beside planes


@dataclass(frozen=True)
class _Plane:
    """A buffer of which every (sequence, KV head) has `stride` bytes, the first `used` of them in use."""

    memory: DeviceMemory
    offset: int
    stride: int
    used: int


class CudaEditing(CheckedCache):
    """The methods of `CudaCache` that edit what is stored."""

    stored_layout: Recipe
    variant: Variant
    storage: Storage
    _device: CudaDevice
    _scratch: Scratch
    _lengths: NDArray[np.int64]
    _step: int
    _anchor: int | None
    _fractions: tuple[float, ...]
    _overwritten: bool

    if TYPE_CHECKING:

        def _store_arguments(self) -> tuple[Any, ...]: ...
        def _set_lengths(self, lengths: NDArray[np.int64]) -> None: ...
        def _choose(self) -> None: ...
        def _staged_rows(self, array: Float32) -> tuple[DeviceMemory, TensorView]: ...
        def _empty_like(self, batch: int, capacity: int) -> Self: ...

    @property
    def allocated_bytes(self) -> int:
        return self.storage.n_bytes + self._scratch.size.n_bytes

    @property
    def _present_fractions(self) -> list[float]:
        return list(self._fractions)

    def _extend(self, keys: Tensor, values: Tensor, lengths: Lengths) -> None:
        longest = int(lengths.max(initial=0))
        if not longest:
            self._set_lengths(self._lengths)  # nothing is added, and the count of steps restarts all the same
        elif isinstance(keys, TensorView) and isinstance(values, TensorView):
            self._extend_from_device(keys, values, lengths)
        elif not isinstance(keys, TensorView) and not isinstance(values, TensorView):
            self._extend_from_host(keys, values, lengths, longest)

    def _extend_from_host(self, keys: Float32, values: Float32, lengths: Lengths, longest: int) -> None:
        batch, heads, _, dim = keys.shape
        at_once = max(1, _STAGED_BYTES // (4 * batch * heads * dim))
        for first in range(0, longest, at_once):
            end = min(first + at_once, longest)
            pairs = (np.ascontiguousarray(array[:, :, first:end], np.float32) for array in (keys, values))
            (key_memory, key_view), (value_memory, value_view) = (self._staged_rows(array) for array in pairs)
            self._extend_from_device(key_view, value_view, np.clip(lengths - first, 0, end - first))
            self._device.stream.sync()
            del key_memory, value_memory

    def _extend_from_device(self, keys: TensorView, values: TensorView, more: Lengths) -> None:
        longest = int(more.max(initial=0))
        device, storage, heads = self._device, self.storage, self.storage.layout.heads
        device.upload(storage.lengths, more.astype(np.int32), 4 * self.shape.batch)
        added = storage.lengths.pointer + 4 * self.shape.batch
        arguments = (*self._store_arguments(), storage.state, added, i32(self.shape.kv_heads), i32(heads))
        arguments += key_value_arguments(keys, values)
        editing, along = self.variant.editing(), min(heads, 65535)
        if not self.stored_layout.is_dense:
            device.launch(editing, "extend_cold", (_blocks(longest, PAGE_TOKENS), 2, along), 256, *arguments)
        device.launch(editing, "extend_exact", (_blocks(longest, 8), 2, along), 256, *arguments)
        self._set_lengths(self._lengths + more)

    def _read(self, first: int, last: int) -> tuple[Float32, Float32]:
        shape = (self.shape.batch, self.shape.kv_heads, last - first, self.shape.head_dim)
        if last == first:
            return np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        read = [self._device.allocate(4 * int(np.prod(shape))) for _ in range(2)]
        strides = (shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1)
        self._read_to(first, last, *(TensorView(memory.pointer, "fp32", shape, strides) for memory in read))
        keys, values = (self._device.download(memory, shape, np.float32) for memory in read)
        return keys, values

    def _read_to(self, first: int, last: int, keys: TensorView, values: TensorView) -> None:
        heads = self.storage.layout.heads
        arguments = (self.storage.state, i32(heads), i32(first), i32(last), keys.address, values.address)
        how = (i32(TYPES[keys.dtype]), i32(keys.shape[3]))
        grid = (_blocks(last - first, PAGE_TOKENS) + 1, 2, min(heads, 65535))
        self._device.launch(self.variant.editing(), "read_rows", grid, 256, *self._store_arguments(), *arguments, *how)

    def _gather(self, rows: Lengths, capacity: int) -> Self:
        other = self._empty_like(len(rows), capacity)
        fitting = list(zip(self._planes().values(), other._planes().values(), strict=True))
        sizes = [(mine, theirs, min(mine.used, theirs.stride)) for mine, theirs in fitting]
        self._copy(sizes, rows, np.arange(len(rows)))
        other._lengths, other._step, other._anchor = self._lengths[rows], self._step, self._anchor
        other._put_fractions(self._fractions)
        other._overwritten = True
        return other

    def _reorder(self, rows: Lengths) -> None:
        moved = np.flatnonzero(rows != np.arange(self.shape.batch))
        self._overwritten = True
        heads, planes = len(moved) * self.shape.kv_heads, list(self._planes().values())
        spare = [_Plane(self._device.allocate(heads * p.used), 0, p.used, p.used) for p in planes]
        to_spare, from_spare = (
            [(a, b, a.used) for a, b in zip(*pair, strict=True)] for pair in ((planes, spare), (spare, planes))
        )
        here = np.arange(len(moved))
        self._copy(to_spare, rows[moved], here)
        self._copy(from_spare, here, moved)
        self._lengths = self._lengths[rows]
        self._choose()

    def _planes(self) -> dict[str, _Plane]:
        """Return the buffers that hold tokens, with what is in use at the longest of the lengths."""
        storage, layout, recipe = self.storage, self.storage.layout, self.stored_layout
        longest, heads = int(self._lengths.max(initial=0)), layout.heads
        cold = retained_tokens(cold_tokens(recipe, longest), recipe.stride)
        cold = min(-(-cold // 256) * 256, layout.cold_rows)  # whole vectors of every plane
        exact = min(longest, layout.exact_rows) if recipe.is_dense or not layout.wraps else layout.exact_rows

        def plane(memory: DeviceMemory, n_bytes: int, used: int, rows: int) -> _Plane:
            stride = n_bytes // heads
            return _Plane(memory, 0, stride, stride * used // max(rows, 1))

        outputs = self.shape.group * self.shape.head_dim * 4 if layout.reused else 0
        return {
            "exact_keys": plane(storage.exact_k, layout.exact_plane, exact, layout.exact_rows),
            "exact_values": plane(storage.exact_v, layout.exact_plane, exact, layout.exact_rows),
            "cold_keys": plane(storage.cold_k, layout.key_plane, cold, layout.cold_rows),
            "cold_values": plane(storage.cold_v, layout.value_plane, cold, layout.cold_rows),
            "key_scales": plane(storage.k_scale, layout.key_scales, cold, layout.cold_rows),
            "value_scales": plane(storage.v_scale, layout.value_scales, cold, layout.cold_rows),
            "lists": plane(storage.lists, layout.lists, cold, layout.cold_rows),
            "listed": plane(storage.listed, layout.listed, 1, 1),
            "key_state": _Plane(storage.state, 0, 8, 8),
            "value_state": _Plane(storage.state, 8 * heads, 8, 8),
            "next_state": _Plane(storage.state, 16 * heads, 8, 8),
            "bad": _Plane(storage.bad, 0, 4, 4),
            "reused": _Plane(storage.cached_output, 0, outputs, outputs),
            "reused_lse": _Plane(storage.cached_output, outputs * heads, outputs // 4, outputs // 4),
        }

    def _copy(self, planes: list[tuple[_Plane, _Plane, int]], from_rows: NDArray[np.int64], to_rows: NDArray[np.int64]) -> None:
        """Copy the first bytes of rows from planes to others; row `from_rows[i]` becomes row `to_rows[i]`."""
        device = self._device
        table = np.array(
            [(a.memory.pointer + a.offset, b.memory.pointer + b.offset, a.stride, b.stride, n) for a, b, n in planes if n],
            np.uint64,
        )
        numbers = np.concatenate([from_rows, to_rows]).astype(np.int32)
        on_device = device.allocate(table.nbytes + numbers.nbytes)
        device.upload(on_device, table)
        device.upload(on_device, numbers, table.nbytes)
        rows = on_device.pointer + table.nbytes
        heads = len(from_rows) * self.shape.kv_heads
        device.launch(
            self.variant.editing(),
            "copy_rows",
            (_COPY_BLOCKS, len(table), min(heads, 65535)),
            256,
            *(on_device, rows, rows + 4 * len(from_rows), i32(self.shape.kv_heads), i32(heads)),
        )

    def _crop(self, lengths: Lengths) -> None:
        before, after = self._lengths, lengths
        self._overwritten = True
        device, storage, heads = self._device, self.storage, self.storage.layout.heads
        device.upload(storage.lengths, after.astype(np.int32))
        arguments = (storage.state, storage.lengths, i32(self.shape.kv_heads), i32(heads))
        grid = (_blocks(int((before - after).max()), PAGE_TOKENS), 2, min(heads, 65535))
        device.launch(self.variant.editing(), "crop_rows", grid, 256, *self._store_arguments(), *arguments)
        self._set_lengths(after)

    def _set_fractions(self, fractions: list[float]) -> None:
        self._overwritten = True
        self._put_fractions(fractions)
        self._set_lengths(self._lengths)

    def _put_fractions(self, fractions: Sequence[float]) -> None:
        """Let selections read these shares from now on."""
        self._fractions = tuple(fractions)
        layout = self.storage.layout
        if layout.counts:
            pages = np.arange(layout.page_capacity + 1)
            shares = np.array(fractions, np.float64)[:, None]
            counts = np.minimum(pages, np.maximum(1, (shares * pages).astype(np.int64)))
            self._device.upload(self.storage.counts, counts.astype(np.int32))
        self._choose()

    @property
    def _arrangement(self) -> NDArray[np.int64]:
        """What planes of equal sizes could differ in: whether tokens lie in pages, and whether as another recipe keeps them."""
        return np.array([self.variant.paged, self.stored_layout != self.recipe], np.int64)

    def state(self) -> CacheState:
        layout, batch, heads = self.storage.layout, self.shape.batch, self.shape.kv_heads
        held: CacheState = {}
        for name, plane in self._planes().items():
            raw = self._device.download(plane.memory, (layout.heads, plane.stride), np.uint8, plane.offset)
            held[name] = raw.reshape(batch, heads, plane.stride)[:, :, : plane.used].copy()
        numbers = (
            self._lengths,
            np.array([self._step, -2 if self._anchor is None else self._anchor]),
            np.array(self._fractions),
            self._arrangement,
        )
        return held | dict(zip(_NUMBERS, (n.copy() for n in numbers), strict=True))

    def load_state(self, state: CacheState) -> None:
        batch, heads, layout = self.shape.batch, self.shape.kv_heads, self.storage.layout
        lengths, clock, fractions, arrangement = (state.get(name) for name in _NUMBERS)
        if arrangement is None or not np.array_equal(arrangement, self._arrangement):
            raise UsageError(
                "the saved tokens lie otherwise than they would here, because of the device, or of the batch and capacity that "
                "the cache was first made for: load it on the device it was saved from, or store the prompt anew"
            )
        planes = self._planes()
        for name, plane in planes.items():
            given = state[name].shape if name in state else None
            if given is None or given[:2] != (batch, heads) or given[2] > plane.stride or state[name].dtype != np.uint8:
                raise ValueError(
                    f"the saved {name} of shape {given} do not fit a cache of {(batch, heads, plane.stride)} bytes"
                )
        if lengths is None or lengths.shape != (batch,) or clock is None or clock.shape != (2,):
            raise ValueError("the saved lengths are not those of a cache of this batch")
        if fractions is None:
            raise ValueError("the saved fractions are missing")
        if lengths.max(initial=0) > self.capacity or lengths.min(initial=0) < 0:
            raise ValueError(f"the saved tokens do not fit a capacity of {self.capacity}")
        check_fractions(fractions, heads)
        if layout.listed:
            said = np.ascontiguousarray(state["listed"]).view(np.int32).reshape(batch, heads, 2)
            # Lists of before a crop may name what is no page any more; they are made anew before they are read.
            check_lists(
                np.ascontiguousarray(state["lists"]).view(np.int32), said[..., 0], said[..., 1], np.array(layout.page_capacity)
            )
        for name, plane in planes.items():
            raw = np.zeros((batch, heads, plane.stride), np.uint8)
            raw[:, :, : state[name].shape[2]] = state[name]
            self._device.upload(plane.memory, raw.reshape(layout.heads, plane.stride), plane.offset)
        self._lengths, self._step = lengths.astype(np.int64), int(clock[0])
        self._anchor = None if clock[1] == -2 else int(clock[1])
        self._overwritten = True
        self._put_fractions([float(share) for share in fractions])


def key_value_arguments(keys: TensorView, values: TensorView) -> tuple[Any, ...]:
    """Return what GIVEN_SIGNATURE of kernels/store.cuh names; of a single token the view may lack the dimension."""
    strides = (i64(n) for rows in (keys, values) for n in _token_strides(rows))
    return keys.address, values.address, *strides, i32(TYPES[keys.dtype]), i32(keys.shape[-1])


def _token_strides(rows: TensorView) -> tuple[int, ...]:
    """Return the elements from one sequence, head and token to the next."""
    return rows.strides[:3] if len(rows.strides) == 4 else (*rows.strides[:2], 0)


def _blocks(tokens: int, per_block: int) -> int:
    return max(1, min(-(-tokens // per_block), _BLOCKS))
