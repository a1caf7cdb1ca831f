"""The cache of one layer on a CUDA device."""

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickv.attention.feedback import Feedback
from elastickv.backends.cuda.contents import Contents
from elastickv.backends.cuda.device import CudaDevice, Memory, f32, i32, i64, u64
from elastickv.backends.cuda.storage import Layout, Scratch, Storage
from elastickv.backends.cuda.variants import Variant, fixed_blocks, selecting_blocks
from elastickv.cache.layer import Float32, StoredHead, beyond_int4, check_shape
from elastickv.errors import NonFiniteError, UsageError
from elastickv.recipe import PAGE_TOKENS, AttentionShape, Recipe, regions
from elastickv.recipe.pages import selected

_CHUNK_TOKENS = 1 << 15
_TOO_LARGE = 1 << 31


class CudaLayerCache:
    """A `LayerCache` in device memory, whose tokens are kept as another recipe of equal results may keep them."""

    def __init__(
        self,
        device: CudaDevice,
        shape: AttentionShape,
        capacity: int,
        dtype: str,
        recipe: Recipe,
        kept: Recipe,
        variant: Variant,
        blocks: int,
        layout: Layout,
        scratch: Scratch,
        phase: int = 0,
    ) -> None:
        self.shape, self.capacity, self.dtype, self.recipe, self.phase = shape, capacity, dtype, recipe, phase
        recipe.check_phase(phase)
        self._kept, self.variant, self.blocks = kept, variant, blocks
        self._device, self._scratch = device, scratch
        self.storage = Storage(device, layout)
        if layout.counts:
            pages = range(layout.page_capacity + 1)
            table = [[selected(n, fraction) for n in pages] for fraction in recipe.fractions]
            device.upload(self.storage.counts, np.array(table, np.int32))
        fixed = variant.fixed() if len(set(recipe.fractions)) <= 1 else None
        equal = fixed_blocks(shape.batch * shape.kv_heads * self.passes, device.multiprocessors)
        self._fixed = (fixed, equal) if fixed and equal else None
        self._lengths = np.zeros(shape.batch, np.int64)
        self._step = -1
        self._anchor: int | None = None  # step of the last anchor that was decoded
        self._stream = device.stream
        self._restart(self._lengths)
        self.mark()

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self._lengths

    @property
    def step(self) -> int:
        return self._step

    @property
    def passes(self) -> int:
        """Passes over the query heads of a KV head."""
        return -(-self.shape.group // self.variant.rows)

    def prefill(self, keys: Float32, values: Float32, lengths: NDArray[np.int64]) -> None:
        """Store (batch, kv_heads, tokens, head_dim) keys and values; row b uses its first `lengths[b]` tokens."""
        longest = int(max(lengths, default=0))
        if longest > min(keys.shape[2], self.capacity):
            raise UsageError(f"a sequence of {longest} tokens does not fit a capacity of {self.capacity}")
        self._restart(lengths)
        dim = self.shape.head_dim
        # Chunks end where pages do.
        sinks = min(self._kept.sinks, longest)
        edges = [0, *range(sinks + _CHUNK_TOKENS, longest, _CHUNK_TOKENS), longest]
        rows = max(min(longest, sinks + _CHUNK_TOKENS), 1)
        staged = [self._device.allocate(rows * dim * 4) for _ in range(2)]
        storing = self.variant.storing()
        for head in range(self.storage.layout.heads):
            row, kv_head = divmod(head, self.shape.kv_heads)
            length = int(self._lengths[row])
            for first, end in itertools.pairwise(edges):
                count = min(end, length) - first
                if count <= 0:
                    break
                for memory, array in zip(staged, (keys, values), strict=True):
                    self._device.upload(memory, np.asarray(array[row, kv_head, first : first + count], np.float32))
                arguments = (*self._store_arguments(), *staged, i64(head), i32(first), i32(count), i32(length))
                self._device.launch(storing, "store_rows", (min(-(-count // 8), 4096), 2), 256, *arguments)
                if self.variant.paged:
                    self._device.launch(storing, "store_pages", (min(-(-count // PAGE_TOKENS), 4096), 2), 256, *arguments)
        self._stream.sync()

    def fill_random(self, lengths: NDArray[np.int64], seed: int) -> None:
        """Store seeded random normal tokens, made where they are stored."""
        if max(lengths, default=0) > self.capacity:
            raise UsageError(f"a sequence of {max(lengths)} tokens does not fit a capacity of {self.capacity}")
        self._restart(lengths)
        heads = self.storage.layout.heads
        grid = (max(1, min(-(-int(max(lengths)) // 8), 16384 // heads + 1)), 2, min(heads, 65535))
        arguments = (*self._store_arguments(), self.storage.state, i32(heads), u64(seed % (1 << 64)))
        self._device.launch(self.variant.storing(), "fill_random", grid, 256, *arguments)
        if self.variant.paged:
            self._device.launch(self.variant.storing(), "fill_pages", grid, 256, *arguments)
        self._stream.sync()

    def _restart(self, lengths: NDArray[np.int64]) -> None:
        self._lengths, self._step, self._anchor = np.array(lengths, np.int64), -1, None
        if self.storage.layout.listed:
            self._device.upload(self.storage.listed, np.zeros((self.storage.layout.heads, 2), np.int32))
        heads = self.storage.layout.heads
        on_device = self._device.allocate(4 * self.shape.batch)
        self._device.upload(on_device, self._lengths.astype(np.int32))
        arguments = (self.storage.state, on_device, i32(self.shape.kv_heads), i32(heads), i32(-1), self.storage.bad)
        self._device.launch(self.variant.storing(), "set_state", (-(-heads // 256),), 256, *arguments)
        self._stream.sync()

    def append(self, keys: Float32, values: Float32) -> None:
        """Store one token per sequence: (batch, kv_heads, head_dim). Quantises the page that leaves the window, if one does."""
        self.check_room(1)
        for name, array in (("keys", keys), ("values", values)):
            check_shape(array, (self.shape.batch, self.shape.kv_heads, self.shape.head_dim), name)
        n_bytes = self.shape.batch * self.shape.kv_heads * self.shape.head_dim * 4
        staged = [self._device.allocate(n_bytes) for _ in range(2)]
        for memory, array in zip(staged, (keys, values), strict=True):
            self._device.upload(memory, np.asarray(array, np.float32))
        self._launch_append(staged[0], staged[1], None, None, None, (0.0, 0.0, 0.0))
        self._stream.sync()
        self.count(1)

    def launch_feedback(self, outputs: Memory, queries: Memory, tables: Memory, feedback: Feedback) -> None:
        """Queue the append of what `feedback` makes of `outputs`, and leave the next `queries`."""
        rms = (feedback.query_rms, feedback.key_rms, feedback.value_rms)
        self._launch_append(None, None, outputs, queries, tables, rms)

    def _launch_append(
        self,
        keys: Memory | None,
        values: Memory | None,
        outputs: Memory | None,
        queries: Memory | None,
        tables: Memory | None,
        rms: tuple[float, float, float],
    ) -> None:
        arguments = (self.storage.state, i32(self.capacity), keys, values, outputs, queries, i32(self.shape.group), tables)
        self._device.launch(
            self.variant.storing(),
            "append",
            (self.storage.layout.heads, 2),
            256,
            *self._store_arguments(),
            *arguments,
            *(f32(x) for x in rms),
        )

    def decode(self, queries: Float32) -> tuple[Float32, Float32]:
        """Attend with one query per sequence; returns outputs and log-sum-exps."""
        shape = self.shape
        dims = (shape.batch, shape.query_heads, shape.head_dim)
        check_shape(queries, dims, "queries")
        self.note_decodes(self.step, self.step)
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
        self._device.kernel(self._decoding()[0], "decode")
        self._device.kernel(self.variant.storing(), "append")
        if self.recipe.selection == "pages":
            self._device.kernel(self.variant.selecting(), "select")

    def _decoding(self) -> tuple[Variant, int]:
        """Return kernel and blocks of a decode: what sequences of one length have to read is the same for every KV head."""
        equal = self._fixed if len(set(self._lengths.tolist())) <= 1 else None
        return equal or (self.variant, self.blocks)

    def _launch_select(self, queries: Memory, after_append: bool) -> None:
        shape, storage, recipe, layout = self.shape, self.storage, self._kept, self.storage.layout
        stride = layout.page_capacity + 1 if len(recipe.fractions) > 1 else 0
        numbers = (
            shape.kv_heads,
            shape.group,
            recipe.sinks,
            recipe.window,
            recipe.anchor_every,
            self.phase,
            layout.page_capacity,
        )
        variant = self.variant.selecting()
        self._device.launch(
            variant,
            "select",
            (selecting_blocks(layout.page_capacity, layout.heads, self._device.multiprocessors), layout.heads),
            variant.threads,
            *(queries, storage.k_scale, storage.state, storage.counts, i32(stride)),
            *(self._scratch.scores, self._scratch.counters, storage.lists, storage.listed),
            *(i32(x) for x in (*numbers, int(after_append))),
        )

    def launch_decode(self, queries: Memory, outputs: Memory, lse: Memory, after_append: bool = False) -> None:
        """Queue a decode. `after_append`: since the last, one token was appended and kernels of another cache were queued."""
        if self.recipe.selection == "pages":
            self._launch_select(queries, after_append)
        shape, storage, recipe, layout = self.shape, self.storage, self._kept, self.storage.layout
        reused = storage.cached_output
        lse_offset = shape.batch * shape.query_heads * shape.head_dim * 4
        sizes = (shape.batch, shape.kv_heads, shape.group, self.passes)
        kept_how = (recipe.sinks, recipe.window, layout.ring, recipe.stride, recipe.anchor_every, self.phase)
        scale = math.log2(math.e) / math.sqrt(shape.head_dim)
        variant, blocks = self._decoding()
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
            shared=variant.shared_bytes,
        )

    def _store_arguments(self) -> tuple[Any, ...]:
        s, recipe, layout = self.storage, self._kept, self.storage.layout
        numbers = (recipe.sinks, recipe.window, layout.ring, recipe.stride, layout.exact_rows, layout.cold_rows)
        return (s.exact_k, s.exact_v, s.cold_k, s.cold_v, s.k_scale, s.v_scale, s.bad, *(i32(x) for x in numbers))

    def note_decodes(self, first: int, last: int) -> None:
        """Note that steps `first` to `last` are decoded; RuntimeError if the first reuses what was never computed."""
        anchor = first - self.recipe.age(first, self.phase)
        if self.recipe.age(first, self.phase) and self._anchor != anchor:
            what = "list of pages" if self.recipe.selection == "pages" else "cold output"
            raise RuntimeError(f"step {first} reuses the {what} of anchor {anchor}, which was not decoded")
        self._anchor = last - self.recipe.age(last, self.phase)

    def check_room(self, tokens: int) -> None:
        """Refuse to grow past the capacity."""
        for row, length in enumerate(self._lengths):
            if length + tokens > self.capacity:
                raise UsageError(f"the cache is full: sequence {row} holds {length} of {self.capacity} tokens")

    def count(self, tokens: int) -> None:
        """Note that the device appended `tokens` to every sequence."""
        self._lengths = self._lengths + tokens
        self._step += tokens

    def stored(self, row: int, kv_head: int) -> StoredHead:
        """Return what is stored of one KV head of one sequence."""
        head = row * self.shape.kv_heads + kv_head
        contents = Contents(self._device, self.storage, self.shape.head_dim, self._kept, self.dtype, self.variant.paged)
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
        self._stream.sync()
        self._marked = (self._lengths.copy(), self._step, self._anchor)

    def rewind(self) -> None:
        """Return to the marked state; everything appended since is forgotten."""
        self.storage.restore()
        self._stream.sync()
        lengths, self._step, self._anchor = self._marked
        self._lengths = lengths.copy()

    def raise_non_finite(self) -> None:
        """Raise NonFiniteError, naming sequence, KV head and position, if a NaN or infinity was ever stored."""
        word = int(self._device.download(self.storage.bad, (1,), np.uint64)[0])
        if word != (1 << 64) - 1:
            row, head = divmod(word >> 32, self.shape.kv_heads)
            position = word & 0x7FFFFFFF
            if word & _TOO_LARGE:
                raise NonFiniteError(beyond_int4(row, head, position))
            raise NonFiniteError(f"a value that is not finite: sequence {row}, KV head {head}, position {position}")
