"""Where the tokens of one layer lie in device memory.

Everything is sized for the capacity and contiguous per (sequence, KV head). Exact plane: `dense` keeps all tokens in it; else
the sinks, then a ring of whole pages for the window and the page that fills up behind it. Cold planes: kept rows, oldest
first; scales in planes of their own. A sequence's length and step stand together, once per KV head, so that a block can
count its own head's token without waiting for others.
"""

from dataclasses import dataclass

from elastickv.backends.cuda.device import CudaDevice, Memory
from elastickv.backends.cuda.variants import Variant
from elastickv.recipe import PAGE_TOKENS, AttentionShape, Recipe, regions
from elastickv.recipe.formats import FORMATS, round_up
from elastickv.recipe.pages import kept

_NAN_WORD = 0x7FFFFFFF
_FLOAT = 4
_MERGE_LEVELS = 2
_UNIT, _INT8_UNIT = 16, 32
_SCALE_ROWS = 32  # a lane loads the scales of 8 tokens at once, a warp of 32


@dataclass(frozen=True)
class Layout:
    """Sizes of one layer's storage, in rows and bytes.

    Attributes
    ----------
    heads : (sequence, KV head) pairs.
    exact_rows, cold_rows : rows of a pair in the exact and in the cold planes.
    ring : tokens of the ring; 0 when dense.
    wraps : whether the ring overwrites tokens, so that `mark` must copy it.
    """

    heads: int
    exact_rows: int
    cold_rows: int
    ring: int
    wraps: bool
    exact_plane: int
    cold_plane: int
    scale_plane: int
    reused: int
    outputs: int
    lse: int
    state: int

    @classmethod
    def of(cls, shape: AttentionShape, capacity: int, dtype: str, recipe: Recipe) -> "Layout":
        """Return the layout of a cache."""
        heads, dim = shape.batch * shape.kv_heads, shape.head_dim
        exact_row = FORMATS[recipe.exact_dtype(dtype)].row_bytes(dim)
        queries = shape.batch * shape.query_heads
        if recipe.key_format is None:
            exact_rows, ring, wraps, cold_rows, cold_row, scales = capacity, 0, False, 0, 0, 0
        else:
            needed = round_up(recipe.window, PAGE_TOKENS) + PAGE_TOKENS
            all_tokens = max(round_up(capacity - recipe.sinks, PAGE_TOKENS), PAGE_TOKENS)
            ring, wraps = min(needed, all_tokens), needed < capacity - recipe.sinks
            exact_rows = recipe.sinks + ring
            cold = kept(regions(capacity, recipe.sinks, recipe.window).cold, recipe.stride)
            cold_rows = round_up(cold, _SCALE_ROWS)
            cold_row = FORMATS[recipe.key_format].row_bytes(dim)
            scales = heads * cold_rows * 2 if recipe.key_format == "int8" else 0
        return cls(
            heads=heads,
            exact_rows=exact_rows,
            cold_rows=cold_rows,
            ring=ring,
            wraps=wraps,
            exact_plane=heads * exact_rows * exact_row,
            cold_plane=heads * cold_rows * cold_row,
            scale_plane=scales,
            reused=queries * (dim + dim // 4) * _FLOAT if recipe.selection == "reuse" else 0,
            outputs=queries * dim * _FLOAT,
            lse=queries * _FLOAT,
            state=heads * 8,
        )

    def units(self, recipe: Recipe) -> int:
        """Return the units of equal bytes that a full cache's head is read in: 16 rows, or 32 of int8."""
        per_cold = _INT8_UNIT if recipe.key_format == "int8" else _UNIT
        return -(-self.exact_rows // _UNIT) + -(-self.cold_rows // per_cold)

    @property
    def n_bytes(self) -> int:
        """Everything a cache allocates for itself, copies for `mark` included."""
        marked = 2 * self.exact_plane if self.wraps else 0
        planes = 2 * (self.exact_plane + self.cold_plane + self.scale_plane) + marked
        return planes + 2 * self.reused + 2 * self.state + 8 + 2 * self.outputs + self.lse


@dataclass(frozen=True)
class ScratchSize:
    """What the blocks of a decode leave for each other: partial results and counters."""

    partial: int
    partial_ml: int
    counters: int

    @classmethod
    def of(cls, variant: Variant, blocks: int, problems: int) -> "ScratchSize":
        """Return the sizes for a grid of `blocks` over `problems`."""
        slots = blocks + problems
        rows = _MERGE_LEVELS * slots * (1 + variant["REUSE"]) * variant.rows
        return cls(rows * variant["HEAD_DIM"] * _FLOAT, rows * 2 * _FLOAT, (problems + slots) * 4)

    @property
    def n_bytes(self) -> int:
        """All of it."""
        return self.partial + self.partial_ml + self.counters


class Scratch:
    """Decodes follow each other on one stream, so all caches share one; the counters return to zero by themselves."""

    def __init__(self, device: CudaDevice, size: ScratchSize) -> None:
        self.size = size
        self.partial = device.allocate(size.partial, _NAN_WORD)
        self.partial_ml = device.allocate(size.partial_ml, _NAN_WORD)
        self.counters = device.allocate(size.counters, 0)

    def holds(self, size: ScratchSize) -> bool:
        """Return whether a decode of `size` can use it."""
        mine = self.size
        return size.partial <= mine.partial and size.partial_ml <= mine.partial_ml and size.counters <= mine.counters


class Storage:
    """The device buffers of one layer."""

    def __init__(self, device: CudaDevice, layout: Layout) -> None:
        self._device, self.layout = device, layout
        self.exact_k = device.allocate(layout.exact_plane, 0)
        self.exact_v = device.allocate(layout.exact_plane, 0)
        self.cold_k = device.allocate(layout.cold_plane, 0)
        self.cold_v = device.allocate(layout.cold_plane, 0)
        self.k_scale = device.allocate(layout.scale_plane, 0)
        self.v_scale = device.allocate(layout.scale_plane, 0)
        self.state = device.allocate(layout.state, 0)
        self.bad = device.allocate(8, 0xFFFFFFFF)
        self.cached_output = device.allocate(layout.reused, _NAN_WORD)
        self.queries = device.allocate(layout.outputs, _NAN_WORD)
        self.outputs = device.allocate(layout.outputs, _NAN_WORD)
        self.lse = device.allocate(layout.lse, _NAN_WORD)
        copied = [(self.state, layout.state), (self.cached_output, layout.reused)]
        if layout.wraps:
            copied += [(self.exact_k, layout.exact_plane), (self.exact_v, layout.exact_plane)]
        self._copies: list[tuple[Memory, Memory, int]] = [(m, device.allocate(n, 0), n) for m, n in copied]

    def save(self) -> None:
        """Copy what later appends and decodes overwrite."""
        for memory, kept_copy, n_bytes in self._copies:
            self._device.copy(kept_copy, memory, n_bytes)

    def restore(self) -> None:
        """Return to what `save` copied."""
        for memory, kept_copy, n_bytes in self._copies:
            self._device.copy(memory, kept_copy, n_bytes)
