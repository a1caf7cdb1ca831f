"""The part of a cache that serves a model: further chunks, rows that move, crops and saved states."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from elastickv.backends.cpu import readback, steps, threads
from elastickv.backends.cpu.layout import NO_ANCHOR, STATE_WORDS, BufferField, BufferLayout, State
from elastickv.kvcache.checked_cache import CheckedCache
from elastickv.kvcache.checks import check_fractions, check_lists, cold_tokens
from elastickv.kvcache.hadamard import rotated_tokens
from elastickv.kvcache.protocol import CacheState, Lengths
from elastickv.kvcache.tensor_view import Float32, Tensor, TensorView, write_array
from elastickv.recipe import PAGE_TOKENS, regions
from elastickv.recipe.regions import retained_tokens

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_STEPS = 1 << 40
_SECTIONS = ("cold", "exact", "bounds", "state", "lists", "reused")


class CpuEditing(CheckedCache):
    """The methods of `CpuCache` that edit what is stored."""

    layout: BufferLayout
    descriptor: NDArray[np.int64]
    thread_count: int
    _state: NDArray[np.int64]
    _own: threads.OneThread
    _marked: bool

    if TYPE_CHECKING:

        def threads_worth(self, tokens: int) -> int: ...
        def _store(self, keys: Tensor, values: Tensor, lengths: Lengths) -> None: ...
        def _empty_like(self, batch: int, capacity: int) -> Self: ...
        def _section(self, name: str) -> NDArray[np.uint8]: ...

    @property
    def allocated_bytes(self) -> int:
        return self.layout.total_bytes

    @property
    def _present_fractions(self) -> list[float]:
        fractions: list[float] = self._section("fractions").view(np.float64).tolist()
        return fractions

    def _extend(self, keys: Tensor, values: Tensor, lengths: Lengths) -> None:
        with self._own:
            self._store(keys, values, lengths)
            self._restart_steps()

    def _restart_steps(self) -> None:
        self._state[..., State.STEP] = -1
        self._state[..., State.ANCHOR_STEP] = NO_ANCHOR

    def _read(self, first: int, last: int) -> tuple[Float32, Float32]:
        return rotated_tokens(*self._read_held(first, last), self.recipe)

    def _read_held(self, first: int, last: int) -> tuple[Float32, Float32]:
        rows = (self.shape.batch, self.shape.kv_heads, last - first, self.shape.head_dim)
        keys, values = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        counters = np.zeros(steps.TICKET_WORDS, np.int64)
        arrays = (self.descriptor, counters, keys, values)
        number = self.threads_worth(self.shape.batch * (last - first))
        threads.run(readback.read_block, number, [*(array.ctypes.data for array in arrays), first, last])
        return keys, values

    def _read_to(self, first: int, last: int, keys: TensorView, values: TensorView) -> None:
        for target, rows in zip((keys, values), self._read(first, last), strict=True):
            write_array(target, rows)

    def _gather(self, rows: Lengths, capacity: int) -> Self:
        other = self._empty_like(len(rows), capacity)
        used = self._used()
        for name in _SECTIONS:
            other._of_rows(name)[:, :, : used[name]] = self._of_rows(name)[:, :, : used[name]][rows]
        other._section("fractions")[:] = self._section("fractions")
        other._marked = False
        return other

    def _reorder(self, rows: Lengths) -> None:
        moved = np.flatnonzero(rows != np.arange(self.shape.batch))
        self._marked = False
        used = self._used()
        for name in _SECTIONS:
            section = self._of_rows(name)[:, :, : used[name]]
            section[moved] = section[rows[moved]]

    def _of_rows(self, name: str) -> NDArray[np.uint8]:
        """Return a section as (batch, kv_heads, bytes)."""
        size = self.layout.section(name)[1] // (self.shape.batch * self.shape.kv_heads)
        return self._section(name).reshape(self.shape.batch, self.shape.kv_heads, size)

    def _used(self) -> dict[str, int]:
        """Return the bytes of each section that a (sequence, KV head) uses at the longest of the lengths."""
        fields, recipe = self.layout.fields, self.recipe
        longest = int(self.lengths.max(initial=0))
        split = regions(longest, recipe.sinks, recipe.window)
        pages = 0 if recipe.is_dense else -(-retained_tokens(split.cold, recipe.stride) // PAGE_TOKENS)
        whole = {name: self._of_rows(name).shape[2] for name in _SECTIONS}
        exact = -(-longest // PAGE_TOKENS) * fields[BufferField.EXACT_PAGE_BYTES] if recipe.is_dense else whole["exact"]
        used = {"cold": pages * fields[BufferField.COLD_PAGE_BYTES], "bounds": pages * 4 * self.shape.head_dim, "exact": exact}
        return {name: min(used.get(name, size), size) for name, size in whole.items()}

    def _crop(self, lengths: Lengths) -> None:
        recipe, before, after = self.recipe, self.lengths, lengths
        self._marked = False
        cold = [(cold_tokens(recipe, old), cold_tokens(recipe, new)) for old, new in zip(before, after, strict=True)]
        first = recipe.sinks + min((new for old, new in cold if old > new), default=0)
        last = recipe.sinks + max((old for old, new in cold if old > new), default=0)
        if last > first:
            keys, values = self._read_held(first, last)
            for row, (old, new) in enumerate(cold):
                span = slice(recipe.sinks + new - first, min(recipe.sinks + old, int(after[row])) - first)
                if old > new and span.stop > span.start:
                    rows = [np.ascontiguousarray(array[row, :, span]) for array in (keys, values)]
                    words = [row, *(array.ctypes.data for array in rows), first + span.start, span.stop - span.start]
                    threads.run(readback.write_window, 1, [self.descriptor.ctypes.data, *words])
        self._state[..., State.LENGTH] = after[:, None]
        for word in (State.BAD_POSITION, State.BEYOND_POSITION):
            positions = self._state[..., word]
            positions[positions >= after[:, None]] = -1
        self._restart_steps()

    def _set_fractions(self, fractions: list[float]) -> None:
        self._marked = False
        self._section("fractions").view(np.float64)[:] = fractions
        self._restart_steps()

    def state(self) -> CacheState:
        used = self._used()
        sections = {name: self._of_rows(name)[:, :, : used[name]].copy() for name in _SECTIONS}
        return sections | {"fractions": self._section("fractions").copy()}

    def load_state(self, state: CacheState) -> None:
        fits = {name: self._of_rows(name).shape for name in _SECTIONS}
        for name, (batch, heads, size) in fits.items():
            shape = state[name].shape if name in state else None
            if shape is None or shape[:2] != (batch, heads) or shape[2] > size or state[name].dtype != np.uint8:
                raise ValueError(f"the saved {name} of shape {shape} do not fit a cache of {(batch, heads, size)} bytes")
        fractions = state.get("fractions")
        if fractions is None or fractions.shape != self._section("fractions").shape or fractions.dtype != np.uint8:
            raise ValueError("the saved fractions are not those of a cache of these heads and this recipe")
        numbers = state["state"].copy(order="C").view(np.int64).reshape(*fits["state"][:2], STATE_WORDS)
        self._check_numbers(numbers, np.ascontiguousarray(state["lists"]).view(np.int32))
        state = state | {"state": numbers.view(np.uint8).reshape(fits["state"])}
        if self.recipe.selection == "pages":
            check_fractions(fractions.view(np.float64), self.shape.kv_heads)
        for name in _SECTIONS:
            self._of_rows(name)[:, :, : state[name].shape[2]] = state[name]
        self._section("fractions")[:] = fractions
        self._marked = False

    def _check_numbers(self, numbers: NDArray[np.int64], lists: NDArray[np.int32]) -> None:
        """Raise ValueError for numbers that no decode leaves in the state: the kernels address memory by them."""
        lengths = numbers[..., State.LENGTH]
        if not ((lengths >= 0) & (lengths <= self.capacity)).all():
            raise ValueError(f"the saved tokens do not fit a capacity of {self.capacity}")
        alike = numbers[..., [State.STEP, State.ANCHOR_STEP, State.PENDING]]
        if (alike != alike[0, 0]).any() or (lengths != lengths[:, :1]).any() or alike[0, 0, 2]:
            raise ValueError("the saved state is not the same for all heads")
        step, anchor = (int(number) for number in alike[0, 0, :2])
        if not (-1 <= step < MAX_STEPS and -2 <= anchor <= step):
            raise ValueError(f"the saved steps are {step} and {anchor}")
        steps_since_refresh = self.recipe.steps_since_refresh(step + 1, self.anchor_offset)
        if steps_since_refresh and anchor != step + 1 - steps_since_refresh:
            raise ValueError(f"the saved step {step} follows no anchor")
        pages = np.array([[cold_tokens(self.recipe, length) // PAGE_TOKENS] for length in lengths[:, 0]])
        if self.recipe.selection != "pages" or anchor < 0:
            # No list is read before the next one is made.
            numbers[..., [State.LISTED, State.ANCHOR_PAGES, State.READ_PAGES]] = 0
        check_lists(lists, numbers[..., State.LISTED], numbers[..., State.ANCHOR_PAGES], pages)
        if not ((numbers[..., State.READ_PAGES] >= 0) & (numbers[..., State.READ_PAGES] <= pages)).all():
            raise ValueError("the saved state has read more pages than there are")
