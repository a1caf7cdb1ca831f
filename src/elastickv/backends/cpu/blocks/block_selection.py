"""Pages of a serving engine's blocks that decodes read: rows of queries list the best by the bounds that K's scales are."""

import numpy as np

from elastickv.backends.cpu import layout
from elastickv.backends.cpu.blocks.block_rows import widen_row
from elastickv.backends.cpu.blocks.block_tokens import ROW_TABLES_BYTES, element_bytes, row_tables, slab
from elastickv.backends.cpu.blocks.host_blocks import AnchorField, BlockField
from elastickv.backends.cpu.elements import RANGE_FACTORS
from elastickv.backends.cpu.intrinsics import atomic_add, inlined, invoke_4, load_i64, store_f32, store_i32, words
from elastickv.backends.cpu.numba_cache import kernel
from elastickv.backends.cpu.selection import list_best, score_pages
from elastickv.backends.cpu.vector import scale_into

_B, _F = BlockField, layout.BufferField
KV_HEADS, QUERY, QUERY_STRIDE = int(_B.KV_HEADS), int(_B.QUERY), int(_B.QUERY_STRIDE)
DESCRIPTOR, COUNTERS, BOUNDS_OFFSET = int(_B.DESCRIPTOR), int(_B.COUNTERS), int(_B.BOUNDS_OFFSET)
ANCHORS, ANCHOR_COUNT = int(_B.ANCHORS), int(_B.ANCHOR_COUNT)
SCORES, SCORES_BYTES = int(_B.SCORES), int(_B.SCORES_BYTES)
GROUP, DIM, EXACT_FORMAT = int(_F.GROUP), int(_F.DIM), int(_F.EXACT_FORMAT)
COLD_KEY_FORMAT, WEIGHTS_KERNEL = int(_F.COLD_KEY_FORMAT), int(_F.WEIGHTS_KERNEL)
REQUEST, ROW, PAGES, TARGET, HEAD_BYTES = (8 * int(field) for field in AnchorField)
ANCHOR_WORDS = len(AnchorField)
ONE, GREATEST = np.float32(1), np.float32(np.inf)


@inlined
def _score(a, c, thread, request, row, head, pages, scores):  # type: ignore[no-untyped-def]
    """Write the scores of the first pages of a request for the queries of one KV head of a row."""
    group, dim = c[GROUP], c[DIM]
    weights = row_tables(a, c, thread) + ROW_TABLES_BYTES
    queries = weights + 2 * dim * 4
    source = a[QUERY] + row * a[QUERY_STRIDE] + head * group * dim * element_bytes(c)
    widen_row(c[EXACT_FORMAT], source, group * dim, queries, ONE)
    invoke_4(c[WEIGHTS_KERNEL], queries, group, dim, weights)
    of_scales = weights + dim * 4
    scale_into(of_scales, of_scales, dim, RANGE_FACTORS[c[COLD_KEY_FORMAT]])
    for page in range(pages):
        bounds = slab(a, request, page, head) + a[BOUNDS_OFFSET]
        score_pages(0, 1, bounds, dim, weights, of_scales, scores + 4 * page)


@kernel("void(int64, int64)")
def list_pages(arguments, thread):  # type: ignore[no-untyped-def]
    """List the pages of the best scores for rows of queries, ascending. Threads take items by ticket: one KV head of a row.

    The first page is always among them: it has the tokens that queries attend to whatever they look for (Xiao et al. 2024).
    """
    a = words(arguments)
    c = words(a[DESCRIPTOR])
    item = atomic_add(a[COUNTERS], 1)
    while item < a[ANCHOR_COUNT] * a[KV_HEADS]:
        head = item % a[KV_HEADS]
        anchor = a[ANCHORS] + item // a[KV_HEADS] * 8 * (ANCHOR_WORDS + a[KV_HEADS])
        pages, count = load_i64(anchor + PAGES), load_i64(anchor + 8 * (ANCHOR_WORDS + head))
        target = load_i64(anchor + TARGET) + head * load_i64(anchor + HEAD_BYTES)
        if count < pages:
            scores = a[SCORES] + thread * a[SCORES_BYTES]
            _score(a, c, thread, load_i64(anchor + REQUEST), load_i64(anchor + ROW), head, pages, scores)
            store_f32(scores, GREATEST)
            listed = list_best(scores, pages, count, target)
            for number in range(listed, count):  # among scores that are NaN there may be fewer
                store_i32(target + 4 * number, 0)
        else:
            for page in range(count):
                store_i32(target + 4 * page, page)
        item = atomic_add(a[COUNTERS], 1)
