"""The part of a cache that serves a model: further chunks, rows that move, crops and saved states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from elastickv.backends.cuda import launch
from elastickv.backends.cuda.arguments import StoreArguments
from elastickv.backends.cuda.device import CudaDevice, DeviceMemory
from elastickv.backends.cuda.kernel_selection import Variant
from elastickv.backends.cuda.storage import Scratch, Storage
from elastickv.backends.cuda.tensor_arguments import StagedTokens, row_target, token_rows
from elastickv.errors import UsageError
from elastickv.kvcache.checked_cache import CheckedCache
from elastickv.kvcache.checks import check_fractions, check_lists, cold_tokens
from elastickv.kvcache.protocol import CacheState, Lengths
from elastickv.kvcache.tensor_view import Float32, Tensor, TensorView
from elastickv.recipe import Recipe
from elastickv.recipe.regions import retained_tokens

if TYPE_CHECKING:
    from typing_extensions import Self

_STAGED_BYTES = 1 << 28  # of keys, and of values, that are copied from the host at once
_NUMBERS = ("lengths", "clock", "fractions", "arrangement")  # entries of `state` in addition to planes


@dataclass(frozen=True)
class _Plane:
    """A buffer with `stride` bytes per (sequence, KV head), of which the first `used` are in use."""

    memory: DeviceMemory
    offset: int
    stride: int
    used: int


class CudaEditing(CheckedCache):
    """The methods of `CudaCache` that edit what is stored."""

    stored_recipe: Recipe
    variant: Variant
    _editing: Variant
    storage: Storage
    _store_arguments: StoreArguments
    _device: CudaDevice
    _scratch: Scratch
    _lengths: NDArray[np.int64]
    _step: int
    _anchor: int | None
    _fractions: tuple[float, ...]
    _overwritten: bool

    if TYPE_CHECKING:

        def _set_lengths(self, lengths: NDArray[np.int64]) -> None: ...
        def _choose(self) -> None: ...
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
            self._set_lengths(self._lengths)  # nothing is stored, but steps restart
        elif isinstance(keys, TensorView) and isinstance(values, TensorView):
            self._extend_from_device(keys, values, lengths)
        elif not isinstance(keys, TensorView) and not isinstance(values, TensorView):
            self._extend_from_host(keys, values, lengths, longest)

    def _extend_from_host(self, keys: Float32, values: Float32, lengths: Lengths, longest: int) -> None:
        batch, heads, _, dim = keys.shape
        at_once = max(1, _STAGED_BYTES // (4 * batch * heads * dim))
        for first in range(0, longest, at_once):
            end = min(first + at_once, longest)
            tokens = StagedTokens(self._device, keys[:, :, first:end], values[:, :, first:end])
            self._extend_from_device(tokens.keys, tokens.values, np.clip(lengths - first, 0, end - first))
            self._device.stream.sync()
            del tokens  # before memory is allocated for the next ones

    def _extend_from_device(self, keys: TensorView, values: TensorView, more: Lengths) -> None:
        longest = int(more.max(initial=0))
        device, storage, heads = self._device, self.storage, self.storage.layout.heads
        device.upload(storage.lengths, more.astype(np.int32), 4 * self.shape.batch)
        added = storage.lengths.pointer + 4 * self.shape.batch
        rows = token_rows(keys, values)
        for extend in (*(() if self.stored_recipe.is_dense else (launch.extend_cold,)), launch.extend_exact):
            extend(
                device,
                self._editing,
                longest,
                store=self._store_arguments,
                state=storage.state,
                added=added,
                kv_heads=self.shape.kv_heads,
                heads=heads,
                tokens=rows,
            )
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
        launch.read_rows(
            self._device,
            self._editing,
            store=self._store_arguments,
            state=self.storage.state,
            heads=self.storage.layout.heads,
            first=first,
            last=last,
            target=row_target(keys, values),
        )

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
        """Return the buffers that hold tokens, with the bytes in use at the longest length."""
        storage, layout, recipe = self.storage, self.storage.layout, self.stored_recipe
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
            "cold_pages": plane(storage.cold_pages, layout.cold_pages, cold, layout.cold_rows),
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
        launch.copy_rows(
            device,
            self._editing,
            len(table),
            planes=on_device,
            from_rows=rows,
            to_rows=rows + 4 * len(from_rows),
            kv_heads=self.shape.kv_heads,
            heads=len(from_rows) * self.shape.kv_heads,
        )

    def _crop(self, lengths: Lengths) -> None:
        before, after = self._lengths, lengths
        self._overwritten = True
        storage = self.storage
        self._device.upload(storage.lengths, after.astype(np.int32))
        launch.crop_rows(
            self._device,
            self._editing,
            int((before - after).max()),
            store=self._store_arguments,
            state=storage.state,
            lengths=storage.lengths,
            kv_heads=self.shape.kv_heads,
            heads=storage.layout.heads,
        )
        self._set_lengths(after)

    def _set_fractions(self, fractions: list[float]) -> None:
        self._overwritten = True
        self._put_fractions(fractions)
        self._set_lengths(self._lengths)

    def _put_fractions(self, fractions: Sequence[float]) -> None:
        """Set the shares of pages that selections list."""
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
        """How planes of equal sizes can differ: tokens in pages or rows, stored under the recipe or under another."""
        return np.array([self.variant.paged, self.stored_recipe != self.recipe], np.int64)

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
                "the saved tokens have another layout than this cache, because of the device, or of the batch and capacity "
                "that the cache was first made for: load it on the device it was saved from, or store the prompt again"
            )
        planes = self._planes()
        for name, plane in planes.items():
            shape = state[name].shape if name in state else None
            if shape is None or shape[:2] != (batch, heads) or shape[2] > plane.stride or state[name].dtype != np.uint8:
                raise ValueError(
                    f"the saved {name} of shape {shape} do not fit a cache of {(batch, heads, plane.stride)} bytes"
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
            # Lists from before a crop may name pages that no longer exist; they are rebuilt before they are read.
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
