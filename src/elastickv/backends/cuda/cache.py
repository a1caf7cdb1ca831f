"""The cache of one layer on a CUDA device."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickv.backends.cuda.device import CudaDevice, DeviceMemory, f32, i32, i64, u64
from elastickv.backends.cuda.editing import CudaEditing, key_value_arguments
from elastickv.backends.cuda.kernel_selection import TYPES, Variant, fixed_blocks, selecting_blocks
from elastickv.backends.cuda.readback import Contents
from elastickv.backends.cuda.storage import DeviceLayout, Scratch, Storage
from elastickv.backends.feedback import Feedback
from elastickv.errors import NonFiniteError
from elastickv.kvcache.checks import beyond_int4, check_anchor, check_marked, check_room
from elastickv.kvcache.protocol import Lengths, StoredHead
from elastickv.kvcache.tensor_view import Float32, Tensor, TensorView
from elastickv.recipe import PAGE_TOKENS, AttentionShape, Recipe, regions

_NUMBERS = itertools.count()
_TOO_LARGE, _NOTHING = 1 << 31, (1 << 32) - 1  # beside positions, in what says where a head has a bad value


class CudaCache(CudaEditing):
    """A `LayerCache` in device memory. `stored_layout` is a recipe of equal results that says how its tokens are stored."""

    def __init__(
        self,
        device: CudaDevice,
        shape: AttentionShape,
        capacity: int,
        dtype: str,
        recipe: Recipe,
        anchor_offset: int,
        stored_layout: Recipe,
        variant: Variant,
        blocks: int,
        layout: DeviceLayout,
        scratch: Scratch,
        resized: Callable[["CudaCache", int, int], "CudaCache"],
    ) -> None:
        self._describe(shape, capacity, dtype, recipe, anchor_offset)
        self.stored_layout, self.variant, self.blocks = stored_layout, variant, blocks
        self._device, self._scratch, self._resized = device, scratch, resized
        self.storage = Storage(device, layout)
        self._number = next(_NUMBERS)
        self._lengths = np.zeros(shape.batch, np.int64)
        self._step = -1
        self._anchor: int | None = None  # step of the last anchor that was decoded
        self._marked: tuple[NDArray[np.int64], int, int | None] | None = None
        self._overwritten = False  # whether what was marked, to begin with no tokens, is there no more
        fixed = variant.fixed()
        equal = fixed_blocks(shape.batch * shape.kv_heads * self.passes, device.multiprocessors)
        self._fixed = (fixed, equal) if fixed and equal else None
        self._fractions: tuple[float, ...] = ()
        self._decoding = (variant, blocks)
        self.launch_key = (self._number, False)  # changes with the memory or the kernel of `enqueue_step`
        self.longest = 0
        self._put_fractions([recipe.fraction(head) for head in range(shape.kv_heads)])
        self._restart(self._lengths)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self._lengths

    @property
    def step(self) -> int:
        return self._step

    @property
    def room(self) -> int:
        """Tokens that every sequence can still take."""
        return self.capacity - self.longest

    @property
    def passes(self) -> int:
        """Passes over the query heads of a KV head."""
        return -(-self.shape.group // self.variant.rows)

    def _prefill(self, keys: Tensor, values: Tensor, lengths: Lengths) -> None:
        self._overwritten = True
        self._restart(np.zeros(self.shape.batch, np.int64))
        self._extend(keys, values, lengths)

    def _fill_random(self, lengths: Lengths, seed: int) -> None:
        self._overwritten = True
        self._restart(lengths)
        heads = self.storage.layout.heads
        grid = (max(1, min(-(-int(max(lengths)) // 8), 16384 // heads + 1)), 2, min(heads, 65535))
        arguments = (*self._store_arguments(), self.storage.state, i32(heads), u64(seed % (1 << 64)))
        self._device.launch(self.variant.storing(), "fill_random", grid, 256, *arguments)
        if self.variant.paged:
            self._device.launch(self.variant.storing(), "fill_pages", grid, 256, *arguments)
        self._device.stream.sync()

    def _restart(self, lengths: NDArray[np.int64]) -> None:
        """Hold `lengths` tokens, all of them finite, before the first step."""
        self._set_lengths(lengths, all_finite=True)

    def _set_lengths(self, lengths: NDArray[np.int64], all_finite: bool = False) -> None:
        """Hold `lengths` tokens, before the first step."""
        self._lengths, self._step, self._anchor = np.array(lengths, np.int64), -1, None
        if self.storage.layout.listed:
            self._device.fill(self.storage.listed, 0)
        self._put_state(all_finite)
        self._choose()

    def _put_state(self, all_finite: bool) -> None:
        """Tell the device what the host has counted."""
        storage, heads = self.storage, self.storage.layout.heads
        self._device.upload(storage.lengths, self._lengths.astype(np.int32))
        numbers = (i32(self.shape.kv_heads), i32(heads), i32(self._step))
        arguments = (storage.state, storage.lengths, *numbers, storage.bad, i32(all_finite))
        self._device.launch(self.variant.storing(), "set_state", (-(-heads // 256),), 256, *arguments)

    def _choose(self) -> None:
        """Choose the kernel and blocks of a decode: those of equal work for every KV head where that is so."""
        alike = len(set(self._fractions)) <= 1 and len(set(self._lengths.tolist())) <= 1
        fixed = self._fixed if alike else None
        self._decoding, self.launch_key = fixed or (self.variant, self.blocks), (self._number, fixed is not None)
        self.longest = int(self._lengths.max(initial=0))

    def _append(self, keys: Float32, values: Float32) -> None:
        pairs = (np.asarray(array, np.float32)[:, :, None] for array in (keys, values))
        (key_memory, key_view), (value_memory, value_view) = (self._staged_rows(array) for array in pairs)
        self._launch_append_rows(key_view, value_view, None, 1.0)
        self._device.stream.sync()
        del key_memory, value_memory
        self.advance(1)

    def _staged(self, array: Float32) -> DeviceMemory:
        memory = self._device.allocate(array.nbytes)
        self._device.upload(memory, array)
        return memory

    def _staged_rows(self, array: Float32) -> tuple[DeviceMemory, TensorView]:
        """Return device memory with the (batch, kv_heads, tokens, head_dim) rows of a host array, and their view."""
        memory, (_, heads, tokens, dim) = self._staged(array), array.shape
        return memory, TensorView(memory.pointer, "fp32", array.shape, (heads * tokens * dim, tokens * dim, dim, 1))

    def _launch_append_rows(self, keys: TensorView, values: TensorView, queries: TensorView | None, query_scale: float) -> None:
        storage, shape = self.storage, self.shape
        asked = (None, i64(0), i64(0)) if queries is None else (queries.address, *(i64(n) for n in queries.strides[:2]))
        self._device.launch(
            self.variant.storing(),
            "append_rows",
            (storage.layout.heads, 2),
            256,
            *self._store_arguments(),
            *(storage.state, i32(self.capacity), *key_value_arguments(keys, values), i32(shape.kv_heads), *asked),
            *(storage.queries, i32(shape.group), f32(query_scale)),
        )

    def _enqueue_step(
        self, keys: TensorView, values: TensorView, queries: TensorView, scale: float, outputs: TensorView, lse: TensorView
    ) -> None:
        self._launch_append_rows(keys, values, queries, scale)
        self.launch_decode(self.storage.queries, outputs.address, lse.address, True, outputs.dtype)

    def launch_feedback(self, outputs: DeviceMemory, queries: DeviceMemory, tables: DeviceMemory, feedback: Feedback) -> None:
        """Queue the append of what `feedback` makes of `outputs`, and leave the next `queries`."""
        storage, rms = self.storage, (feedback.query_rms, feedback.key_rms, feedback.value_rms)
        self._device.launch(
            self.variant.storing(),
            "append",
            (storage.layout.heads, 2),
            256,
            *self._store_arguments(),
            *(storage.state, i32(self.capacity), outputs, queries, i32(self.shape.group), tables),
            *(f32(x) for x in rms),
        )

    def _expect_decode(self, step: int) -> None:
        self.expect_decodes(step, step)

    def _decode(self, queries: Float32) -> tuple[Float32, Float32]:
        dims = (self.shape.batch, self.shape.query_heads, self.shape.head_dim)
        self._device.upload(self.storage.queries, np.asarray(queries, np.float32))
        self.launch_decode(self.storage.queries, self.storage.outputs, self.storage.lse)
        outputs = self._device.download(self.storage.outputs, dims, np.float32)
        return outputs, self._device.download(self.storage.lse, dims[:2], np.float32)

    @property
    def kernels_to_decode(self) -> int:
        """Kernels that a decode launches."""
        return 2 if self.recipe.selection == "pages" else 1

    def load(self) -> None:
        """Load every kernel of a step: that is not allowed during a capture."""
        self._device.kernel(self._decoding[0], "decode")
        self._device.kernel(self.variant.storing(), "append")
        if self.recipe.selection == "pages":
            self._device.kernel(self.variant.selecting(), "select")

    def _launch_select(self, queries: DeviceMemory, after_append: bool) -> None:
        shape, storage, recipe, layout = self.shape, self.storage, self.stored_layout, self.storage.layout
        numbers = (
            shape.kv_heads,
            shape.group,
            recipe.sinks,
            recipe.window,
            recipe.anchor_every,
            self.anchor_offset,
            layout.page_capacity,
        )
        variant = self.variant.selecting()
        self._device.launch(
            variant,
            "select",
            (selecting_blocks(layout.page_capacity, layout.heads, self._device.multiprocessors), layout.heads),
            variant.threads,
            *(queries, storage.k_scale, storage.state, storage.counts, i32(layout.page_capacity + 1)),
            *(self._scratch.scores, self._scratch.counters, storage.lists, storage.listed),
            *(i32(x) for x in (*numbers, int(after_append))),
        )

    def launch_decode(
        self,
        queries: DeviceMemory,
        outputs: DeviceMemory | int,
        lse: DeviceMemory | int,
        after_append: bool = False,
        output_dtype: str = "fp32",
    ) -> None:
        """Queue a decode. `after_append`: since the last, one token was appended and kernels of another cache were queued."""
        if self.recipe.selection == "pages":
            self._launch_select(queries, after_append)
        shape, storage, recipe, layout = self.shape, self.storage, self.stored_layout, self.storage.layout
        reused = storage.cached_output
        lse_offset = shape.batch * shape.query_heads * shape.head_dim * 4
        sizes = (shape.batch, shape.kv_heads, shape.group, self.passes)
        kept_how = (recipe.sinks, recipe.window, layout.ring, recipe.stride, recipe.anchor_every, self.anchor_offset)
        scale = math.log2(math.e) / math.sqrt(shape.head_dim)
        variant, blocks = self._decoding
        scratch = self._scratch
        partial = (scratch.mail, scratch.mail_ml) if variant.mails else (scratch.partial, scratch.partial_ml)
        self._device.launch(
            variant,
            "decode",
            (blocks,),
            variant.threads,
            queries,
            outputs,
            lse,
            *(storage.exact_k, storage.exact_v, storage.cold_k, storage.cold_v, storage.k_scale, storage.v_scale),
            storage.state,
            *(*partial, scratch.counters),
            *(reused, reused.pointer + lse_offset, storage.lists, storage.listed),
            *(i32(x) for x in (*sizes, *kept_how, layout.exact_rows, layout.cold_rows, layout.page_capacity)),
            f32(math.log2(recipe.decay)),
            f32(scale),
            i32(TYPES[output_dtype]),
            shared=variant.shared_bytes,
        )

    def _store_arguments(self) -> tuple[Any, ...]:
        s, recipe, layout = self.storage, self.stored_layout, self.storage.layout
        numbers = (recipe.sinks, recipe.window, layout.ring, recipe.stride, layout.exact_rows, layout.cold_rows)
        return (s.exact_k, s.exact_v, s.cold_k, s.cold_v, s.k_scale, s.v_scale, s.bad, *(i32(x) for x in numbers))

    def expect_decodes(self, first: int, last: int) -> None:
        """Note that steps `first` to `last` are decoded; RuntimeError if the first reuses what was never computed."""
        check_anchor(self.recipe, first, self.anchor_offset, self._anchor)
        self._anchor = last - self.recipe.steps_since_refresh(last, self.anchor_offset)

    def rollback_step(self) -> None:
        """Enqueue what undoes a step that was not committed: enqueued again, it then does the same."""
        self._put_state(all_finite=False)

    def check_room(self, tokens: int) -> None:
        """Raise UsageError if a sequence can't take `tokens` more."""
        check_room(self._lengths, tokens, self.capacity)

    def commit_step(self) -> None:
        """Count the token of the enqueued step."""
        self.advance(1)

    def advance(self, steps: int) -> None:
        """Count `steps` tokens that the device has appended to every sequence."""
        self._lengths = self._lengths + steps
        self._step += steps
        self.longest += steps

    def _empty_like(self, batch: int, capacity: int) -> "CudaCache":
        return self._resized(self, batch, capacity)

    def stored(self, row: int, kv_head: int) -> StoredHead:
        """Return what is stored of one KV head of one sequence."""
        head = row * self.shape.kv_heads + kv_head
        contents = Contents(self._device, self.storage, self.shape.head_dim, self.stored_layout, self.dtype, self.variant.paged)
        held = contents.of(head, int(self._lengths[row]))
        if self.recipe.is_dense:
            keys, values = (
                np.concatenate(p) for p in ((held.cold_keys, held.exact_keys), (held.cold_values, held.exact_values))
            )
            return StoredHead(keys[:0], values[:0], keys, values)
        return held

    def pages_read(self, row: int, kv_head: int) -> NDArray[np.int64] | None:
        """Return the numbers of the cold pages that the last decode read; None where the recipe selects none."""
        if self.recipe.selection != "pages":
            return None
        head = row * self.shape.kv_heads + kv_head
        cold = regions(int(self._lengths[row]), self.recipe.sinks, self.recipe.window).cold // PAGE_TOKENS
        count, fresh = (int(n) for n in self._device.download(self.storage.listed, (2,), np.int32, head * 8))
        numbers = self._device.download(self.storage.lists, (count,), np.int32, head * self.storage.layout.page_capacity * 4)
        return np.concatenate([numbers.astype(np.int64), np.arange(fresh, cold)])

    def mark(self) -> None:
        """Remember the present state."""
        self.storage.save()
        self._device.stream.sync()
        self._marked, self._overwritten = (self._lengths.copy(), self._step, self._anchor), False

    def rewind(self) -> None:
        """Return to the marked state, or to an empty one; everything appended since is forgotten."""
        check_marked(not self._overwritten)
        if self._marked is None:
            self._restart(np.zeros(self.shape.batch, np.int64))
            return
        self.storage.restore()
        self._device.stream.sync()
        lengths, self._step, self._anchor = self._marked
        self._lengths = lengths.copy()
        self._choose()

    def raise_non_finite(self) -> None:
        """Raise NonFiniteError, naming sequence, KV head and position, if a NaN or infinity was ever stored."""
        words = self._device.download(self.storage.bad, (self.shape.batch, self.shape.kv_heads), np.uint32)
        for row, head in np.argwhere(words < _TOO_LARGE):
            raise NonFiniteError(f"a value that is not finite: sequence {row}, KV head {head}, position {words[row, head]}")
        for row, head in np.argwhere(words < _NOTHING):
            raise NonFiniteError(beyond_int4(row, head, int(words[row, head]) - _TOO_LARGE))
