"""The memory layout of a cache: one buffer, described to the kernels by one row of int64.

A page holds 32 tokens of one KV head, K before V, in one contiguous stream:

- K transposed, [head_dim][32 tokens]; int8 by pairs of elements, [head_dim / 2][32 tokens][2], but int8 per channel is not;
  int4 by eights, [head_dim / 8][32 tokens][4 bytes], and int2 by 16; int3 by 32, [head_dim / 32][3 words][32 tokens][4 bytes],
  where codes of 0 fill up the last 32 channels of 80 and 112;
- V in chunks of up to 32 columns, [chunk][32 tokens][columns]; int8 by pairs of tokens, [chunk][16 pairs][columns][2]; int4
  by eights, [chunk][4 eights][columns][4 bytes], and int2 by 16; int3 [chunk][3 words][columns][4 bytes]. A chunk of these
  lies within one group of channels that share a scale;
- scales of K, then of V, bfloat16: int8 one for each token; fp8 one; V of int4, int3 and int2 [group][32 scales, 32 zeros].

Element 2i + h of eight int4 codes is the i-th nibble of the h-th 16-bit word, and of 16 int2 codes the i-th two bits: a shift
and a mask give pairs to multiply. Of int3 the three words of a column of V are all of its page, token 2i + h in half h: five
codes a word from bit 0 on, and bit n of the last two tokens' codes as bit 15 of word n. The three words of a token of K are 32
of its channels, likewise.

Scales of channels of K (int4, int3, int2, int8 per channel) are in a separate plane, the only one that the page scorer reads:
[page][scale, zero][head_dim] halves.

Each (sequence, KV head) has cold pages, which hold the retained cold tokens without gaps, and exact pages: those of the
sinks, then a ring for the tokens after the sinks. In `dense` everything is ring, as long as the capacity. Recipes that select
pages also have the list of an anchor's pages (int32) and room for the scores of all pages.
"""

import math
import struct
from dataclasses import dataclass
from enum import IntEnum

from elastickv.backends.cpu.intrinsics import BLOCK, COLUMNS, FORMAT_CODES, LANES
from elastickv.errors import UsageError
from elastickv.kvcache.hadamard import rotated_block
from elastickv.recipe import FORMATS, PAGE_TOKENS, AttentionShape, Recipe
from elastickv.recipe.formats import ScaleLayout
from elastickv.recipe.regions import retained_tokens, selected

LINE_BYTES = 64
STATE_WORDS = 16
NO_ANCHOR = -2  # no step has this number
COUNTER_BYTES = 4 * LINE_BYTES  # of two phases: score, attend
SPLIT_MAX_PAGES = 128  # also bounds the rounding error of a float32 running sum
SPLIT_MIN_PAGES = 4
ITEMS_PER_THREAD = 8
MARKED = ("state", "lists", "reused")  # sections that `mark` copies, and a ring that wraps
PARTIAL_EXTRA = 16  # running maximum and sum behind a partial's row, padded to a line
TAIL_BYTES = 4096  # 32 columns are loaded of the last row of a narrower chunk
LIST_BYTES = 4
GPTQ_CONSTANTS = 2 * 2 * PAGE_TOKENS  # bytes of 32 ones and 32 zeros, 16 bits each
SCALE_ALIGNMENT = 32
BLOCK_WORDS = 8  # floats of block scratch for each query: factors and such


class BufferField(IntEnum):
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
    COLD_KEY_FORMAT = 10
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
    COLD_VALUE_FORMAT = 32
    VALUE_GROUP = 33  # channels of cold V that share a scale
    PADDED = 34  # accumulators of one query: chunks x 32
    BOUNDS_BASE = 35  # scales and zeros of K's channels
    BOUNDS_HEAD_BYTES = 36
    IS_PAGES = 37
    LISTS_BASE = 38
    LISTS_HEAD_BYTES = 39
    SCORES_BASE = 40
    SCORES_HEAD_BYTES = 41
    SCORE_SPLITS = 42
    FRACTIONS_BASE = 43  # one float64 for each KV head
    SCORE_KERNEL = 44
    ANCHOR_OFFSET = 45  # steps by which anchors come early, filled in by the cache
    WEIGHTS_KERNEL = 46  # address of the page scorer's function, filled in by the cache
    QUANTIZE_KEYS = 47  # addresses of the quantizers of K and V, filled in by the cache
    QUANTIZE_VALUES = 48
    BOUNDS_PAGE_BYTES = 49  # from the scales of one page's channels to those of the next
    KEY_ROTATION = 50  # channels of K that are rotated together; 0: it is stored as it is
    VALUE_ROTATION = 51
    ROTATED_BASE = 52  # a key and a value for each (sequence, KV head), float32: a token that is appended
    KEY_ORDER = 53  # addresses of a `gptq.Compensation`, filled in by the cache
    KEY_SHARES = 54
    VALUE_ORDER = 55
    VALUE_SHARES = 56
    GPTQ_BASE = 57  # scratch of a page that is rounded channel by channel
    GPTQ_HEAD_BYTES = 58


class State(IntEnum):
    """Word of the state of one (sequence, KV head)."""

    LENGTH = 0
    STEP = 1
    BAD_POSITION = 2  # first non-finite one, or -1
    ANCHOR_STEP = 3  # step at which the reused partial or the list of pages was computed
    PENDING = 4  # finished splits of the current phase
    LISTED = 5  # pages in the list
    ANCHOR_PAGES = 6  # cold pages at the anchor: later ones are read without being listed
    READ_PAGES = 7  # cold pages at the last decode
    BEYOND_POSITION = 8  # first key beyond the range of a channel's scale, or -1


def plane_bytes(fmt: str, head_dim: int) -> int:
    """Return the bytes of one page's codes, K or V."""
    return PAGE_TOKENS * head_dim * FORMATS[fmt].bits // 8


def key_plane_bytes(fmt: str, head_dim: int) -> int:
    """Return the bytes of one page's codes of K, which are packed by whole rows of channels."""
    return plane_bytes(fmt, up(head_dim, FORMATS[fmt].packed))


def scale_bytes(fmt: str, head_dim: int, group: int, value: bool) -> int:
    """Return the bytes of one page's scales of K or V inside the page."""
    layout = FORMATS[fmt].values if value else FORMATS[fmt].keys
    if layout is ScaleLayout.CHANNEL:  # a plane of their own
        return 0
    scales = FORMATS[fmt].value_scales(head_dim, group) if value else FORMATS[fmt].key_scales(head_dim)
    return up(scales.bytes_of(PAGE_TOKENS), SCALE_ALIGNMENT)


def page_bytes(key_format: str, value_format: str, head_dim: int, group: int) -> int:
    """Return the bytes of one page, K and V and scales; `group` channels of V share a scale in 4 bits or fewer."""
    codes = key_plane_bytes(key_format, head_dim) + plane_bytes(value_format, head_dim)
    scales = scale_bytes(key_format, head_dim, group, False) + scale_bytes(value_format, head_dim, group, True)
    return up(codes + scales, LINE_BYTES)


def bounds_bytes(key_format: str, head_dim: int) -> int:
    """Return the bytes of one page's scales and zeros of K outside the page."""
    return 4 * head_dim if FORMATS[key_format].keys is ScaleLayout.CHANNEL else 0


def format_code(name: str) -> int:
    """Return a format's number in the kernels.

    Raises
    ------
    UsageError : if no kernel reads it.
    """
    if name not in FORMAT_CODES:
        raise UsageError(f"format {name} has no CPU kernel: choose {', '.join(FORMAT_CODES)}")
    return FORMAT_CODES[name]


def up(n: int, multiple: int) -> int:
    """Return n rounded up to a multiple."""
    return -(-n // multiple) * multiple


def _splits(pages: int, heads: int, threads: int) -> int:
    for_threads = min(-(-threads * ITEMS_PER_THREAD // heads), -(-pages // SPLIT_MIN_PAGES))
    return max(for_threads, -(-pages // SPLIT_MAX_PAGES)) if pages else 0


@dataclass(frozen=True)
class BufferLayout:
    """Sizes and offsets of one cache's buffer."""

    fields: tuple[int, ...]
    sections: tuple[tuple[str, int, int], ...]
    total_bytes: int
    snapshot_bytes: int

    def section(self, name: str) -> tuple[int, int]:
        """Return offset and bytes of a section."""
        return next((start, size) for label, start, size in self.sections if label == name)


def layout(shape: AttentionShape, capacity: int, dtype: str, recipe: Recipe, threads: int) -> BufferLayout:
    """Lay out a cache."""
    heads, dim = shape.batch * shape.kv_heads, shape.head_dim
    after_sinks = max(0, capacity - recipe.sinks)
    exact_format = recipe.exact_dtype(dtype)
    key_format, value_format = recipe.key_format or exact_format, recipe.value_format or exact_format
    v_group = recipe.v_group(dim)
    all_pages = -(-after_sinks // PAGE_TOKENS)
    cold_tokens = 0 if recipe.is_dense else max(0, after_sinks - recipe.window) // PAGE_TOKENS * PAGE_TOKENS
    cold_pages = -(-retained_tokens(cold_tokens, recipe.stride) // PAGE_TOKENS)
    ring_pages = all_pages if recipe.is_dense else min(-(-recipe.window // PAGE_TOKENS) + 1, all_pages)
    sink_pages = -(-min(recipe.sinks, capacity) // PAGE_TOKENS)
    cold_page, exact_page = page_bytes(key_format, value_format, dim, v_group), page_bytes(exact_format, exact_format, dim, dim)
    bounds_head = up(cold_pages * bounds_bytes(key_format, dim), LINE_BYTES)
    pages = recipe.selection == "pages"
    listed = max(selected(cold_pages, recipe.fraction(head)) for head in range(shape.kv_heads)) if pages else 0
    between = -(-(recipe.anchor_every - 1) // PAGE_TOKENS)  # pages that become cold from one anchor to the next
    cold_splits = _splits(min(cold_pages, listed + between) if pages else cold_pages, heads, threads)
    exact_splits = _splits(sink_pages + ring_pages, heads, threads)
    score_splits = max(1, _splits(cold_pages, heads, threads)) if pages else 0
    partial = (dim + PARTIAL_EXTRA) * 4
    padded = max(dim // v_group * up(v_group, COLUMNS), up(dim, COLUMNS))
    # Of each query: accumulators, the query, what is multiplied (int16 or float32), its scale, running state, sums of p x zero.
    per_query = padded * 4 + dim * 4 + dim * 4 + 4 * 4 + dim // v_group * LANES * 4
    work = up(shape.group * per_query + BLOCK * (COLUMNS * 6 + BLOCK_WORDS * 4) + LINE_BYTES, LINE_BYTES)
    score_row = up(cold_pages, LANES) * 4 if pages else 0
    reuse = recipe.selection == "reuse"
    wraps = ring_pages < all_pages
    # Of each (sequence, KV head): codes and errors of a page, float32, and constants.
    gptq = 2 * dim * PAGE_TOKENS * 4 + GPTQ_CONSTANTS if recipe.uses_hessians else 0
    # Room for all pages: `set_fractions` may select them.
    lists_head = up(cold_pages * LIST_BYTES, LINE_BYTES) if pages else 0
    sizes = {
        "cold": heads * cold_pages * cold_page,
        "exact": heads * (sink_pages + ring_pages) * exact_page,
        "tail": TAIL_BYTES,
        "bounds": heads * bounds_head,
        "state": heads * STATE_WORDS * 8,
        "lists": heads * lists_head,
        "reused": heads * shape.group * partial if reuse else 0,
        "partial": heads * (cold_splits + exact_splits) * shape.group * partial,
        "scores": heads * score_row,
        "fractions": shape.kv_heads * 8 if pages else 0,
        "work": threads * work,
        "counters": COUNTER_BYTES,
        "rotated": 2 * heads * dim * 4 if recipe.rotate else 0,
        "gptq": heads * gptq,
        "step_keys": heads * dim * 4,
        "step_values": heads * dim * 4,
        "step_queries": heads * shape.group * dim * 4,
        "step_outputs": heads * shape.group * dim * 4,
        "step_lse": heads * shape.group * 4,
    }
    starts, total = [], LINE_BYTES  # the first line aligns the rest
    for name, size in sizes.items():
        starts.append((name, total, size))
        total += up(size, LINE_BYTES)
    at = {name: start for name, start, _ in starts}
    snapshot = (sizes["exact"] if wraps else 0) + sum(sizes[name] for name in MARKED)
    fields = {
        BufferField.HEADS: heads,
        BufferField.KV_HEADS: shape.kv_heads,
        BufferField.GROUP: shape.group,
        BufferField.DIM: dim,
        BufferField.SINKS: recipe.sinks,
        BufferField.WINDOW: recipe.window,
        BufferField.STRIDE: recipe.stride,
        BufferField.ANCHOR_EVERY: recipe.anchor_every,
        BufferField.IS_DENSE: int(recipe.is_dense),
        BufferField.IS_REUSE: int(reuse),
        BufferField.COLD_KEY_FORMAT: format_code(key_format),
        BufferField.COLD_BASE: at["cold"],
        BufferField.COLD_PAGE_BYTES: cold_page,
        BufferField.COLD_HEAD_BYTES: cold_pages * cold_page,
        BufferField.COLD_SPLITS: cold_splits,
        BufferField.EXACT_FORMAT: format_code(exact_format),
        BufferField.EXACT_BASE: at["exact"],
        BufferField.EXACT_PAGE_BYTES: exact_page,
        BufferField.EXACT_HEAD_BYTES: (sink_pages + ring_pages) * exact_page,
        BufferField.EXACT_SPLITS: exact_splits,
        BufferField.SINK_PAGES: sink_pages,
        BufferField.RING_PAGES: ring_pages,
        BufferField.STATE_BASE: at["state"],
        BufferField.PARTIAL_BASE: at["partial"],
        BufferField.REUSED_BASE: at["reused"],
        BufferField.WORK_BASE: at["work"],
        BufferField.WORK_THREAD_BYTES: work,
        BufferField.CAPACITY: capacity,
        BufferField.LOG2_DECAY: struct.unpack("q", struct.pack("d", math.log2(recipe.decay)))[0],
        BufferField.COLD_VALUE_FORMAT: format_code(value_format),
        BufferField.VALUE_GROUP: v_group,
        BufferField.PADDED: padded,
        BufferField.BOUNDS_BASE: at["bounds"],
        BufferField.BOUNDS_HEAD_BYTES: bounds_head,
        BufferField.BOUNDS_PAGE_BYTES: 4 * dim,
        BufferField.KEY_ROTATION: rotated_block(dim) if recipe.rotates_keys else 0,
        BufferField.VALUE_ROTATION: rotated_block(dim) if recipe.rotates_values else 0,
        BufferField.ROTATED_BASE: at["rotated"],
        BufferField.GPTQ_BASE: at["gptq"],
        BufferField.GPTQ_HEAD_BYTES: gptq,
        BufferField.IS_PAGES: int(pages),
        BufferField.LISTS_BASE: at["lists"],
        BufferField.LISTS_HEAD_BYTES: lists_head,
        BufferField.SCORES_BASE: at["scores"],
        BufferField.SCORES_HEAD_BYTES: score_row,
        BufferField.SCORE_SPLITS: score_splits,
        BufferField.FRACTIONS_BASE: at["fractions"],
    }
    return BufferLayout(tuple(fields.get(f, 0) for f in BufferField), tuple(starts), total + snapshot, snapshot)
