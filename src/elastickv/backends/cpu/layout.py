"""Where a cache's numbers lie: one buffer, described to the kernels by one row of int64.

A page holds 32 tokens of one KV head, K before V, in one contiguous stream:

- K transposed, [head_dim][32 tokens]; int8 by pairs of elements, [head_dim / 2][32 tokens][2];
- V in chunks of 32 columns (the last may have 16), [chunk][32 tokens][columns]; int8 by pairs of tokens,
  [chunk][16 pairs][columns][2];
- int8 only: 32 bfloat16 scales of K, then 32 of V.

Each (sequence, KV head) has cold pages, which hold the kept cold tokens without gaps, and exact pages: those of the sinks,
then a ring that tokens after the sinks go round. `dense` is all ring, as long as the capacity.
"""

import math
import struct
from dataclasses import dataclass
from enum import IntEnum

from elastickv.backends.cpu.intrinsics import BLOCK, COLUMNS, FORMAT_CODES
from elastickv.errors import UsageError
from elastickv.recipe import FORMATS, PAGE_TOKENS, AttentionShape, Recipe
from elastickv.recipe.pages import kept

LINE_BYTES = 64
STATE_WORDS = 8
COUNTER_BYTES = 2 * LINE_BYTES
SPLIT_MAX_PAGES = 128  # also bounds the rounding error of a float32 running sum
SPLIT_MIN_PAGES = 4
ITEMS_PER_THREAD = 8
PARTIAL_EXTRA = 16  # running maximum and sum behind a partial's row, padded to a line
TAIL_BYTES = 4096  # 32 columns are loaded of the last row of a chunk of 16, and the next page is prefetched


class Field(IntEnum):
    """Column of a cache's descriptor."""

    HEADS = 0  # (sequence, KV head) pairs
    KV_HEADS = 1
    GROUP = 2
    DIM = 3
    SINKS = 4
    WINDOW = 5
    STRIDE = 6
    ANCHOR_EVERY = 7
    IS_DENSE = 8
    IS_REUSE = 9
    COLD_FORMAT = 10
    COLD_BASE = 11
    COLD_PAGE_BYTES = 12
    COLD_HEAD_BYTES = 13
    COLD_SPLITS = 14
    EXACT_FORMAT = 15
    EXACT_BASE = 16
    EXACT_PAGE_BYTES = 17
    EXACT_HEAD_BYTES = 18
    EXACT_SPLITS = 19
    SINK_PAGES = 20
    RING_PAGES = 21
    STATE_BASE = 22
    PARTIAL_BASE = 23
    REUSED_BASE = 24
    WORK_BASE = 25
    WORK_THREAD_BYTES = 26
    CAPACITY = 27
    LOG2_DECAY = 28  # bits of a float64
    PAGE_KERNEL = 29  # addresses of compiled functions, filled in by the cache
    ITEM_KERNEL = 30
    APPEND_KERNEL = 31


class State(IntEnum):
    """Word of the state of one (sequence, KV head)."""

    LENGTH = 0
    STEP = 1
    BAD_POSITION = 2  # first non-finite one, or -1
    ANCHOR_STEP = 3  # step at which the reused partial was computed
    PENDING = 4  # splits finished of the step at hand


def page_bytes(fmt: str, head_dim: int) -> int:
    """Return the bytes of one page, K and V and scales."""
    width = FORMATS[fmt].bits // 8
    return 2 * PAGE_TOKENS * (head_dim * width + FORMATS[fmt].key_scales(head_dim).n_bytes)


def up(n: int, multiple: int) -> int:
    """Return n rounded up to a multiple."""
    return -(-n // multiple) * multiple


def _splits(pages: int, heads: int, threads: int) -> int:
    for_threads = min(-(-threads * ITEMS_PER_THREAD // heads), -(-pages // SPLIT_MIN_PAGES))
    return max(for_threads, -(-pages // SPLIT_MAX_PAGES)) if pages else 0


@dataclass(frozen=True)
class Layout:
    """Sizes and offsets of one cache's buffer."""

    fields: tuple[int, ...]
    sections: tuple[tuple[str, int, int], ...]
    total_bytes: int
    snapshot_bytes: int

    def section(self, name: str) -> tuple[int, int]:
        """Return offset and bytes of a section."""
        return next((start, size) for label, start, size in self.sections if label == name)


def layout(shape: AttentionShape, capacity: int, dtype: str, recipe: Recipe, threads: int) -> Layout:
    """Lay out a cache."""
    if recipe.key_format != recipe.value_format or recipe.key_format in ("fp8", "int4"):
        raise UsageError(f"the CPU back end does not read {recipe}")
    heads = shape.batch * shape.kv_heads
    after_sinks = max(0, capacity - recipe.sinks)
    exact_format = recipe.exact_dtype(dtype)
    cold_format = recipe.key_format or exact_format
    all_pages = -(-after_sinks // PAGE_TOKENS)
    cold_tokens = 0 if recipe.is_dense else max(0, after_sinks - recipe.window) // PAGE_TOKENS * PAGE_TOKENS
    cold_pages = -(-kept(cold_tokens, recipe.stride) // PAGE_TOKENS)
    ring_pages = all_pages if recipe.is_dense else min(-(-recipe.window // PAGE_TOKENS) + 1, all_pages)
    sink_pages = -(-min(recipe.sinks, capacity) // PAGE_TOKENS)
    cold_page, exact_page = page_bytes(cold_format, shape.head_dim), page_bytes(exact_format, shape.head_dim)
    cold_splits = _splits(cold_pages, heads, threads)
    exact_splits = _splits(sink_pages + ring_pages, heads, threads)
    partial = (shape.head_dim + PARTIAL_EXTRA) * 4
    padded = up(shape.head_dim, COLUMNS)
    work = up(
        shape.group * (shape.head_dim * 4 + shape.head_dim * 2 + padded * 4 + 4 * 4) + BLOCK * (COLUMNS * 6 + 8) + LINE_BYTES,
        LINE_BYTES,
    )
    reuse = recipe.selection == "reuse"
    wraps = ring_pages < all_pages
    sizes = {
        "cold": heads * cold_pages * cold_page,
        "exact": heads * (sink_pages + ring_pages) * exact_page,
        "tail": TAIL_BYTES,
        "state": heads * STATE_WORDS * 8,
        "reused": heads * shape.group * partial if reuse else 0,
        "partial": heads * (cold_splits + exact_splits) * shape.group * partial,
        "work": threads * work,
        "counters": COUNTER_BYTES,
        "step_keys": heads * shape.head_dim * 4,
        "step_values": heads * shape.head_dim * 4,
        "step_queries": heads * shape.group * shape.head_dim * 4,
        "step_outputs": heads * shape.group * shape.head_dim * 4,
        "step_lse": heads * shape.group * 4,
    }
    starts, total = [], LINE_BYTES  # the first line aligns the rest
    for name, size in sizes.items():
        starts.append((name, total, size))
        total += up(size, LINE_BYTES)
    at = {name: start for name, start, _ in starts}
    snapshot = (sizes["exact"] if wraps else 0) + sizes["state"] + sizes["reused"]
    fields = {
        Field.HEADS: heads,
        Field.KV_HEADS: shape.kv_heads,
        Field.GROUP: shape.group,
        Field.DIM: shape.head_dim,
        Field.SINKS: recipe.sinks,
        Field.WINDOW: recipe.window,
        Field.STRIDE: recipe.stride,
        Field.ANCHOR_EVERY: recipe.anchor_every,
        Field.IS_DENSE: int(recipe.is_dense),
        Field.IS_REUSE: int(reuse),
        Field.COLD_FORMAT: FORMAT_CODES[cold_format],
        Field.COLD_BASE: at["cold"],
        Field.COLD_PAGE_BYTES: cold_page,
        Field.COLD_HEAD_BYTES: cold_pages * cold_page,
        Field.COLD_SPLITS: cold_splits,
        Field.EXACT_FORMAT: FORMAT_CODES[exact_format],
        Field.EXACT_BASE: at["exact"],
        Field.EXACT_PAGE_BYTES: exact_page,
        Field.EXACT_HEAD_BYTES: (sink_pages + ring_pages) * exact_page,
        Field.EXACT_SPLITS: exact_splits,
        Field.SINK_PAGES: sink_pages,
        Field.RING_PAGES: ring_pages,
        Field.STATE_BASE: at["state"],
        Field.PARTIAL_BASE: at["partial"],
        Field.REUSED_BASE: at["reused"],
        Field.WORK_BASE: at["work"],
        Field.WORK_THREAD_BYTES: work,
        Field.CAPACITY: capacity,
        Field.LOG2_DECAY: struct.unpack("q", struct.pack("d", math.log2(recipe.decay)))[0],
        Field.PAGE_KERNEL: 0,
        Field.ITEM_KERNEL: 0,
        Field.APPEND_KERNEL: 0,
    }
    return Layout(tuple(fields[f] for f in Field), tuple(starts), total + snapshot, snapshot)
