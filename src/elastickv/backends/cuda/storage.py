"""The layout of one layer's tokens in device memory.

Everything is sized for the capacity and contiguous per (sequence, KV head):

- Exact planes: all tokens if `dense`; otherwise the sinks, then a ring of whole pages for the window and the page that fills
  up behind it.
- Cold tokens, oldest first: planes of retained rows, with the scales in planes of their own, or pages (pages.cuh).
- State: length and step of a sequence, per KV head once for K and once for V, so that a block counts its own token without
  waiting for others, and a third time as predicted for the next decode.
"""

import dataclasses
from dataclasses import dataclass

from elastickv.backends.cuda.device import CudaDevice, DeviceMemory
from elastickv.backends.cuda.kernel_selection import PAGE_ALIGNMENT_BYTES, Variant
from elastickv.recipe import PAGE_TOKENS, AttentionShape, Recipe, regions
from elastickv.recipe.formats import FORMATS, round_up
from elastickv.recipe.regions import retained_tokens
from elastickv.recipe.slab import Slab

_NAN_WORD = 0x7FFFFFFF
_EMPTY_WORD = 0xFFFF1E77  # EMPTY of kernels/split_kv_buffer.cuh
_FLOAT = 4
_MERGE_LEVELS = 2
_UNIT, _INT8_UNIT = 16, 32
_STATES = 3
_SCALE_ROWS = 32  # a lane loads the scales of 8 tokens at once, a warp those of 32


@dataclass(frozen=True)
class DeviceLayout:
    """Sizes of one layer's storage, in rows and bytes.

    Attributes
    ----------
    heads : (sequence, KV head) pairs.
    exact_rows, cold_rows : rows of a pair in the exact and in the cold planes, or in pages.
    page_stride : bytes from one page to the next; 0 without pages.
    ring : tokens of the ring; 0 when dense.
    wraps : whether the ring overwrites tokens, so that `mark` must copy it.
    """

    heads: int
    exact_rows: int
    cold_rows: int
    ring: int
    wraps: bool
    exact_plane: int
    key_plane: int
    value_plane: int
    key_scales: int
    value_scales: int
    cold_pages: int
    page_stride: int
    lists: int
    counts: int
    reused: int
    outputs: int
    lse: int
    state: int
    lengths: int

    @classmethod
    def of(cls, shape: AttentionShape, capacity: int, dtype: str, recipe: Recipe, paged: bool = False) -> "DeviceLayout":
        """Return the layout of a cache; `paged`: cold tokens are stored in pages."""
        heads, dim = shape.batch * shape.kv_heads, shape.head_dim
        exact_row = FORMATS[recipe.exact_dtype(dtype)].row_bytes(dim)
        queries = shape.batch * shape.query_heads
        exact_rows, ring, wraps, cold_rows = capacity, 0, False, 0
        key_plane = value_plane = key_scales = value_scales = cold_pages = page_stride = lists = counts = 0
        if recipe.key_format is not None and recipe.value_format is not None:
            needed = round_up(recipe.window, PAGE_TOKENS) + PAGE_TOKENS
            all_tokens = max(round_up(capacity - recipe.sinks, PAGE_TOKENS), PAGE_TOKENS)
            ring, wraps = min(needed, all_tokens), needed < capacity - recipe.sinks
            exact_rows = recipe.sinks + ring
            cold = retained_tokens(regions(capacity, recipe.sinks, recipe.window).cold, recipe.stride)
            cold_rows = round_up(cold, PAGE_TOKENS if paged else _SCALE_ROWS)
            key, value = FORMATS[recipe.key_format], FORMATS[recipe.value_format]
            if paged:
                page_stride = round_up(Slab.of(recipe, dim).n_bytes, PAGE_ALIGNMENT_BYTES)
                cold_pages = heads * cold_rows // PAGE_TOKENS * page_stride
            else:
                rows = heads * cold_rows
                key_plane, value_plane = rows * key.key_row_bytes(dim), rows * value.row_bytes(dim)
                key_scales = heads * key.key_scales(dim).bytes_of(cold_rows)
                value_scales = heads * value.value_scales(dim, recipe.v_group(dim)).bytes_of(cold_rows)
            if recipe.selection == "pages":
                lists = heads * cold_rows // PAGE_TOKENS * 4
                counts = shape.kv_heads * (cold_rows // PAGE_TOKENS + 1) * 4
        return cls(
            heads=heads,
            exact_rows=exact_rows,
            cold_rows=cold_rows,
            ring=ring,
            wraps=wraps,
            exact_plane=heads * exact_rows * exact_row,
            key_plane=key_plane,
            value_plane=value_plane,
            key_scales=key_scales,
            value_scales=value_scales,
            cold_pages=cold_pages,
            page_stride=page_stride,
            lists=lists,
            counts=counts,
            reused=queries * (dim + dim // 4) * _FLOAT if recipe.selection == "reuse" else 0,
            outputs=queries * dim * _FLOAT,
            lse=queries * _FLOAT,
            state=_STATES * heads * 8,
            lengths=2 * shape.batch * 4,
        )

    def units(self, recipe: Recipe) -> int:
        """Return the number of equal-sized units in which a full cache's head is read: 16 rows, or 32 of int8."""
        per_cold = _INT8_UNIT if recipe.key_format == "int8" else _UNIT
        return -(-self.exact_rows // _UNIT) + -(-self.cold_rows // per_cold)

    @property
    def n_bytes(self) -> int:
        """Bytes that a cache allocates for itself, without the copies that `mark` makes."""
        rows = self.key_plane + self.value_plane + self.key_scales + self.value_scales
        own = self.lists + self.listed + self.counts + self.reused + self.state + self.bad + self.lengths
        return 2 * self.exact_plane + rows + self.cold_pages + own + 2 * self.outputs + self.lse

    @property
    def marked_bytes(self) -> int:
        """Bytes that `mark` copies."""
        return (2 * self.exact_plane if self.wraps else 0) + self.lists + self.listed + self.reused + self.state + self.bad

    @property
    def bad(self) -> int:
        """Bytes of the positions of values that are not finite."""
        return 4 * self.heads

    @property
    def listed(self) -> int:
        """Bytes of the lists' sizes."""
        return 8 * self.heads if self.counts else 0

    @property
    def page_capacity(self) -> int:
        """Pages of a head."""
        return self.cold_rows // PAGE_TOKENS


@dataclass(frozen=True)
class ScratchSize:
    """Sizes of what the blocks of a decode exchange: partial results and counters."""

    partial: int
    partial_ml: int
    counters: int
    scores: int
    split_kv_buffer: int
    split_kv_buffer_ml: int

    @classmethod
    def of(cls, variant: Variant, blocks: int, problems: int, scores: int) -> "ScratchSize":
        """Return the sizes for a grid of `blocks` over `problems`, and `scores` page scores."""
        partials = blocks + problems
        rows = _MERGE_LEVELS * partials * (1 + variant["REUSE"]) * variant.rows
        row = variant["HEAD_DIM"] * _FLOAT
        split_kv_buffer = blocks * variant.rows * row if variant.fixed() else 0
        return cls(
            rows * row, rows * 2 * _FLOAT, (problems + partials) * 4, scores * _FLOAT, split_kv_buffer, split_kv_buffer // 2
        )

    @property
    def n_bytes(self) -> int:
        """The sum of all parts."""
        return sum(dataclasses.astuple(self))

    def covers(self, other: "ScratchSize") -> bool:
        """Return whether every part is at least as large as `other`'s."""
        mine, needed = (dataclasses.astuple(size) for size in (self, other))
        return all(m >= n for m, n in zip(mine, needed, strict=True))


class Scratch:
    """Scratch memory that all caches share, because decodes run one after the other; kernels reset the counters to zero."""

    def __init__(self, device: CudaDevice, size: ScratchSize) -> None:
        self.size = size
        self.partial = device.allocate(size.partial, _NAN_WORD)
        self.partial_ml = device.allocate(size.partial_ml, _NAN_WORD)
        self.counters = device.allocate(size.counters, 0)
        self.scores = device.allocate(size.scores, _NAN_WORD)
        self.split_kv_buffer = device.allocate(size.split_kv_buffer, _EMPTY_WORD)
        self.split_kv_buffer_ml = device.allocate(size.split_kv_buffer_ml, _EMPTY_WORD)


class Storage:
    """The device buffers of one layer."""

    def __init__(self, device: CudaDevice, layout: DeviceLayout) -> None:
        self._device, self.layout = device, layout
        self.exact_k = device.allocate(layout.exact_plane, 0)
        self.exact_v = device.allocate(layout.exact_plane, 0)
        self.cold_k = device.allocate(layout.key_plane, 0)
        self.cold_v = device.allocate(layout.value_plane, 0)
        self.k_scale = device.allocate(layout.key_scales, 0)
        self.v_scale = device.allocate(layout.value_scales, 0)
        self.cold_pages = device.allocate(layout.cold_pages, 0)
        self.lists = device.allocate(layout.lists, 0)
        self.listed = device.allocate(layout.listed, 0)
        self.counts = device.allocate(layout.counts, 0)
        self.state = device.allocate(layout.state, 0)
        self.bad = device.allocate(layout.bad, 0xFFFFFFFF)
        self.cached_output = device.allocate(layout.reused, _NAN_WORD)
        self.queries = device.allocate(layout.outputs, _NAN_WORD)
        self.outputs = device.allocate(layout.outputs, _NAN_WORD)
        self.lse = device.allocate(layout.lse, _NAN_WORD)
        self.lengths = device.allocate(layout.lengths, 0)
        self._copies: list[tuple[DeviceMemory, DeviceMemory]] | None = None

    @property
    def n_bytes(self) -> int:
        """Allocated bytes, copies of `save` included."""
        return self.layout.n_bytes + (0 if self._copies is None else self.layout.marked_bytes)

    def _marked(self) -> list[DeviceMemory]:
        """Return the buffers that later appends and decodes overwrite."""
        layout, overwritten = self.layout, [self.state, self.bad]
        if layout.reused:
            overwritten.append(self.cached_output)
        if layout.counts:
            overwritten += [self.lists, self.listed]
        if layout.wraps:
            overwritten += [self.exact_k, self.exact_v]
        return overwritten

    def save(self) -> None:
        """Copy the buffers that later appends and decodes overwrite."""
        if self._copies is None:
            self._copies = [(memory, self._device.allocate(memory.n_bytes)) for memory in self._marked()]
        for memory, saved in self._copies:
            self._device.copy(saved, memory, memory.n_bytes)

    def restore(self) -> None:
        """Restore the buffers that `save` copied."""
        assert self._copies is not None, "nothing was saved"
        for memory, saved in self._copies:
            self._device.copy(memory, saved, memory.n_bytes)
