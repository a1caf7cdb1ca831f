"""The CPU backend's cache of one layer."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from elastickv.backends.cpu import decode, page, page_codes, selection, steps, storage, threads
from elastickv.backends.cpu.editing import CpuEditing
from elastickv.backends.cpu.layout import LIST_BYTES, MARKED, NO_ANCHOR, STATE_WORDS, BufferField, BufferLayout, State, layout
from elastickv.backends.cpu.quantizers.gptq_pages import quantizers
from elastickv.errors import NonFiniteError
from elastickv.kvcache.attention import Float64
from elastickv.kvcache.checks import beyond_largest_key, check_anchor, check_marked, check_room, check_shape
from elastickv.kvcache.gptq import LayerCompensation
from elastickv.kvcache.hadamard import rotated_head
from elastickv.kvcache.protocol import Lengths, StoredHead
from elastickv.kvcache.scorers import scorer_of
from elastickv.kvcache.tensor_view import Float32, Tensor, TensorView, to_array, write_array
from elastickv.recipe import AttentionShape, Recipe, regions
from elastickv.recipe.regions import PAGE_TOKENS, retained_tokens

ALIGNMENT_BYTES = 64
KEY_COMPENSATION = (BufferField.KEY_ORDER, BufferField.KEY_SHARES)
VALUE_COMPENSATION = (BufferField.VALUE_ORDER, BufferField.VALUE_SHARES)


class CpuCache(CpuEditing):
    """A `LayerCache` in one block of host memory; `layout` describes the block.

    Python threads may work at the same time, each on its own caches; a second thread inside one cache raises RuntimeError.
    """

    def __init__(
        self,
        shape: AttentionShape,
        capacity: int,
        dtype: str,
        recipe: Recipe,
        anchor_offset: int = 0,
        compensation: LayerCompensation | None = None,
    ) -> None:
        self._describe(shape, capacity, dtype, recipe, anchor_offset, compensation)
        self.thread_count, self._own = threads.count(), threads.OneThread()
        self.layout: BufferLayout = layout(shape, capacity, dtype, recipe, self.thread_count)
        # Zeros, not empty: the tokens beyond a short page are multiplied by zero, so they must not be NaN.
        self._buffer = np.zeros(self.layout.total_bytes - self.layout.snapshot_bytes, np.uint8)
        self._skew = -self._buffer.ctypes.data % ALIGNMENT_BYTES
        self.descriptor = np.array(self.layout.fields, np.int64)
        for field in BufferField:
            if field.name.endswith("_BASE"):
                self.descriptor[field] += self._buffer.ctypes.data + self._skew - ALIGNMENT_BYTES
        self.descriptor[BufferField.ANCHOR_OFFSET] = anchor_offset
        self.descriptor[BufferField.PAGE_KERNEL] = page.attend_page.address
        self.descriptor[BufferField.ITEM_KERNEL] = decode.decode_item.address
        self.descriptor[BufferField.APPEND_KERNEL] = storage.append_token.address
        if not recipe.is_dense:
            of_pages = quantizers(recipe, dtype)
            self.descriptor[[BufferField.QUANTIZE_KEYS, BufferField.QUANTIZE_VALUES]] = [one.address for one in of_pages]
        if compensation is not None:
            for part, fields in ((compensation.keys, KEY_COMPENSATION), (compensation.values, VALUE_COMPENSATION)):
                if part is not None:
                    self.descriptor[list(fields)] = part.order.ctypes.data, part.shares.ctypes.data
        if recipe.selection == "pages":
            self.descriptor[BufferField.SCORE_KERNEL] = selection.score_item.address
            self._weights_kernel = selection.weights_kernel(scorer_of(recipe))
            self.descriptor[BufferField.WEIGHTS_KERNEL] = self._weights_kernel.address
            fractions = [recipe.fraction(head) for head in range(shape.kv_heads)]
            self._section("fractions").view(np.float64)[:] = fractions
        self._state = self._section("state").view(np.int64).reshape(shape.batch, shape.kv_heads, STATE_WORDS)
        self._before_step: NDArray[np.int64] | None = None  # the state that an enqueued step has changed
        self.launch_key = object()
        self._clear()
        wraps = self.layout.snapshot_bytes > sum(self.layout.section(name)[1] for name in MARKED)
        self._marked_sections = [self._section(name) for name in (("exact",) if wraps else ()) + MARKED]
        self._snapshot = [np.empty_like(section) for section in self._marked_sections]
        rows = (shape.batch, shape.kv_heads, shape.head_dim)
        heads = (shape.batch, shape.query_heads)
        self._counters = self._section("counters").view(np.int64)
        self._keys, self._values = (self._floats(f"step_{name}", rows) for name in ("keys", "values"))
        self._queries, self._outputs = (
            self._floats(f"step_{name}", (*heads, shape.head_dim)) for name in ("queries", "outputs")
        )
        self._lse = self._floats("step_lse", heads)
        self._one = np.ones(shape.batch, np.int64)
        arrays = (self.descriptor, self._queries, self._outputs, self._lse)
        self._tables = np.array([array.ctypes.data for array in arrays], np.int64)
        tables = self._tables.ctypes.data
        decode_words = [1, 1, self._counters.ctypes.data, *(tables + 8 * i for i in range(len(arrays)))]
        self._decode_launches = {n: threads.Launch(steps.attend, n, decode_words) for n in {1, self.thread_count}}
        append_arrays = (self.descriptor, self._counters, self._keys, self._values)
        append_words = [*(array.ctypes.data for array in append_arrays), 1, self._one.ctypes.data]
        self._append_launch = threads.Launch(steps.store_block, self.threads_worth(shape.batch), append_words)
        self.mark()

    def _floats(self, section: str, shape: tuple[int, ...]) -> Float32:
        return self._section(section).view(np.float32).reshape(shape)

    def _clear(self) -> None:
        self._state[:] = 0
        self._state[..., State.STEP] = -1
        self._state[..., [State.BAD_POSITION, State.BEYOND_POSITION]] = -1
        self._before_step = None
        self._state[..., State.ANCHOR_STEP] = NO_ANCHOR

    def _section(self, name: str) -> NDArray[np.uint8]:
        start, size = self.layout.section(name)
        start += self._skew - ALIGNMENT_BYTES
        return self._buffer[start : start + size]

    @property
    def lengths(self) -> Lengths:
        return self._committed[:, 0, State.LENGTH].copy()

    @property
    def step(self) -> int:
        return int(self._committed[0, 0, State.STEP])

    @property
    def _committed(self) -> NDArray[np.int64]:
        return self._state if self._before_step is None else self._before_step

    def _prefill(self, keys: Tensor, values: Tensor, lengths: Lengths) -> None:
        with self._own:
            self._clear()
            self._marked = False
            self._store(keys, values, lengths)

    def threads_worth(self, tokens: int) -> int:
        """Return how many of the cache's threads to use on `tokens` tokens of all KV heads."""
        return threads.worth(2 * tokens * self.shape.kv_heads * self.shape.head_dim, self.thread_count)

    def _store(self, keys: Tensor, values: Tensor, lengths: Lengths) -> None:
        k, v = (np.ascontiguousarray(to_array(tensor, self.shape.head_dim), np.float32) for tensor in (keys, values))
        counters = np.zeros(steps.TICKET_WORDS, np.int64)
        tables = (a.ctypes.data for a in (counters, k, v))
        threads.run(
            steps.store_block,
            self.threads_worth(int(lengths.sum())),
            [self.descriptor.ctypes.data, *tables, keys.shape[2], lengths.ctypes.data],
        )

    def _fill_random(self, lengths: Lengths, seed: int) -> None:
        table = np.random.default_rng(seed).standard_normal(1 << steps.TABLE_BITS, dtype=np.float32)
        counters = np.zeros(steps.TICKET_WORDS, np.int64)
        scratch = np.empty((self.shape.batch * self.shape.kv_heads, 3, self.shape.head_dim), np.float32)
        addresses = [a.ctypes.data for a in (self.descriptor, counters, table)]
        words = [*addresses, seed % (1 << 63), scratch.ctypes.data, lengths.ctypes.data]
        with self._own:
            self._clear()
            self._marked = False
            threads.run(steps.store_random, self.thread_count, words)

    def _append(self, keys: Float32, values: Float32) -> None:
        with self._own:
            self._append_unlocked(keys, values)

    def _append_unlocked(self, keys: Float32, values: Float32) -> None:
        self._keys[...], self._values[...] = keys, values
        self._counters[:] = 0
        self._append_launch()
        self._state[..., State.STEP] += 1

    def check_room(self, tokens: int) -> None:
        """Raise UsageError if a sequence can't take `tokens` more."""
        check_room(self.lengths, tokens, self.capacity)

    def check_anchor(self, step: int) -> None:
        """Raise RuntimeError if a decode at `step` would reuse an output or a list of pages that was never computed."""
        check_anchor(self.recipe, step, self.anchor_offset, int(self._state[0, 0, State.ANCHOR_STEP]))

    def _expect_decode(self, step: int) -> None:
        self.check_anchor(step)

    def _decode(self, queries: Float32) -> tuple[Float32, Float32]:
        with self._own:
            self._decode_unlocked(queries)
            return self._outputs.copy(), self._lse.copy()

    def _decode_unlocked(self, queries: Float32) -> None:
        self._queries[...] = queries
        self._counters[:] = 0
        self._decode_launches[self.threads_worth(int(self._state[:, 0, State.LENGTH].sum()))]()

    def _enqueue_step(
        self, keys: TensorView, values: TensorView, queries: TensorView, scale: float, outputs: TensorView, lse: TensorView
    ) -> None:
        head_dim = self.shape.head_dim
        with self._own:
            self._before_step = self._state.copy()
            self._append_unlocked(to_array(keys, head_dim), to_array(values, head_dim))
            self._decode_unlocked(to_array(queries, head_dim) * np.float32(scale))
            write_array(outputs, self._outputs)
            write_array(lse, self._lse)

    def commit_step(self) -> None:
        """Count the token of the enqueued step."""
        self._before_step = None

    def rollback_step(self) -> None:
        """Undo an enqueued step that was not committed.

        The token in the ring and the page that was quantized lie beyond the restored lengths.
        """
        if self._before_step is not None:
            before, self._before_step = self._before_step, None
            if (before[..., State.ANCHOR_STEP] != self._state[..., State.ANCHOR_STEP]).any():
                before[..., State.ANCHOR_STEP] = NO_ANCHOR  # a new anchor has replaced what the last one left
            self._state[...] = before

    def stored(self, row: int, kv_head: int) -> StoredHead:
        """Return what is stored of one KV head of one sequence, dequantized and with a rotation undone."""
        length = int(self._state[row, kv_head, State.LENGTH])
        split = regions(length, self.recipe.sinks, self.recipe.window)
        cold = 0 if self.recipe.is_dense else split.cold
        cold_rows = np.arange(retained_tokens(cold, self.recipe.stride))
        sinks, after = np.arange(split.sinks), np.arange(cold, length - split.sinks)
        ring = max(1, self.layout.fields[BufferField.RING_PAGES])
        pages = self.layout.fields[BufferField.SINK_PAGES] + after // PAGE_TOKENS % ring
        exact_rows = np.r_[sinks, pages * PAGE_TOKENS + after % PAGE_TOKENS].astype(np.int64)
        head = row * self.shape.kv_heads + kv_head
        exact = self.recipe.exact_dtype(self.dtype)
        formats = (self.recipe.key_format or exact, self.recipe.value_format or exact)
        cold_keys, cold_values = self._rows("cold", head, formats, self.recipe.v_group(self.shape.head_dim), cold_rows)
        exact_keys, exact_values = self._rows("exact", head, (exact, exact), self.shape.head_dim, exact_rows)
        return rotated_head(StoredHead(cold_keys, cold_values, exact_keys, exact_values), self.recipe)

    def _rows(
        self, section: str, head: int, formats: tuple[str, str], group: int, rows: NDArray[np.int64]
    ) -> tuple[Float64, Float64]:
        def of_head(name: str, size: BufferField) -> NDArray[np.uint8]:
            stride = self.layout.fields[size]
            return self._section(name)[head * stride : (head + 1) * stride]

        raw = of_head(section, BufferField.COLD_HEAD_BYTES if section == "cold" else BufferField.EXACT_HEAD_BYTES)
        bounds = of_head("bounds", BufferField.BOUNDS_HEAD_BYTES)
        return page_codes.unpack_rows(raw, bounds, formats, self.shape.head_dim, group, rows)

    def pages_read(self, row: int, kv_head: int) -> NDArray[np.int64] | None:
        """Return the numbers of the cold pages that the last decode read; None where the recipe selects none."""
        if self.recipe.selection != "pages":
            return None
        start = (row * self.shape.kv_heads + kv_head) * self.layout.fields[BufferField.LISTS_HEAD_BYTES]
        state = self._state[row, kv_head]
        listed = self._section("lists")[start : start + LIST_BYTES * state[State.LISTED]].view(np.int32)
        return np.r_[listed.astype(np.int64), np.arange(state[State.ANCHOR_PAGES], state[State.READ_PAGES])]

    def _empty_like(self, batch: int, capacity: int) -> "CpuCache":
        shape = replace(self.shape, batch=batch)
        return CpuCache(shape, capacity, self.dtype, self.recipe, self.anchor_offset, self.compensation)

    def mark(self) -> None:
        """Save the present state."""
        for copy, section in zip(self._snapshot, self._marked_sections, strict=True):
            copy[:] = section
        self._marked = True

    def rewind(self) -> None:
        """Return to the marked state."""
        check_marked(self._marked)
        for copy, section in zip(self._snapshot, self._marked_sections, strict=True):
            section[:] = copy

    def raise_non_finite(self) -> None:
        """Raise NonFiniteError, naming sequence, KV head and position, if a NaN or infinity was ever stored."""
        for row, head in np.argwhere(self._state[..., State.BAD_POSITION] >= 0):
            position = self._state[row, head, State.BAD_POSITION]
            raise NonFiniteError(f"a value that is not finite: sequence {row}, KV head {head}, position {position}")
        for row, head in np.argwhere(self._state[..., State.BEYOND_POSITION] >= 0):
            position = self._state[row, head, State.BEYOND_POSITION]
            raise NonFiniteError(beyond_largest_key(self.recipe, row, head, position))


def host_array(array: Float32, shape: tuple[int, ...], name: str) -> Float32:
    """Return contiguous float32 `array` after checking its shape."""
    check_shape(array, shape, name)
    return np.ascontiguousarray(array, np.float32)
