"""Attention to one page: scores, online softmax, weighted values, in a thread's scratch.

`c` is a cache's descriptor (see `layout.BufferField`), `descriptor` its address.
"""

import math

import numpy as np

from elastickv.backends.cpu import layout
from elastickv.backends.cpu.elements import key_plane_bytes, plane_bytes, rotate, scale_bytes, scale_group
from elastickv.backends.cpu.intrinsics import (
    BLOCK,
    COLUMNS,
    FP32,
    LANES,
    inlined,
    load_f32,
    prefetch_line,
    store_f32,
    words,
)
from elastickv.backends.cpu.numba_cache import kernel
from elastickv.backends.cpu.page_operands import (
    finish_values,
    key_operands,
    narrow_query,
    query_factor,
    rows_at_once,
    weigh_tokens,
)
from elastickv.backends.cpu.vector import accumulate_page, clear, multiply_page, scale_into, softmax_page
from elastickv.recipe import PAGE_TOKENS

_F = layout.BufferField
GROUP, DIM, VALUE_GROUP, PADDED = int(_F.GROUP), int(_F.DIM), int(_F.VALUE_GROUP), int(_F.PADDED)
COLD_PAGE_BYTES, BOUNDS_PAGE_BYTES, LINE_BYTES = int(_F.COLD_PAGE_BYTES), int(_F.BOUNDS_PAGE_BYTES), layout.LINE_BYTES
KEY_ROTATION = int(_F.KEY_ROTATION)
WORK_BASE, WORK_THREAD_BYTES = int(_F.WORK_BASE), int(_F.WORK_THREAD_BYTES)
EXTRA = layout.PARTIAL_EXTRA
LOG2_E = np.float32(1 / math.log(2))
ZERO, NOTHING = np.float32(0), np.float32(-np.inf)
# Prefetch distances. The processor's prefetchers do most of the work; longer distances fill their queues with requests of ours.
PREFETCH_FP32_BYTES, PREFETCH_NARROW_BYTES = 512, 2048


@inlined
def _work(c, thread):  # type: ignore[no-untyped-def]
    """Return the addresses of a thread's scratch.

    Of every query: accumulators, queries, queries as they are multiplied (int16 or float32), their scales, running state,
    factors, sums of p x zero. The last is the scratch of the current block of queries.
    """
    accumulators = c[WORK_BASE] + thread * c[WORK_THREAD_BYTES]
    queries = accumulators + c[GROUP] * c[PADDED] * 4
    narrow = queries + c[GROUP] * c[DIM] * 4
    scales = narrow + c[GROUP] * c[DIM] * 4
    state = scales + c[GROUP] * 4
    factors = state + c[GROUP] * 8
    zero_sums = factors + c[GROUP] * 4
    return accumulators, queries, narrow, scales, state, factors, zero_sums, zero_sums + c[GROUP] * _zero_bytes(c)


@inlined
def _zero_bytes(c):  # type: ignore[no-untyped-def]
    return c[DIM] // c[VALUE_GROUP] * LANES * 4


@inlined
def prepare(c, thread, q, key):  # type: ignore[no-untyped-def]
    """Rotate and scale a group's queries (float32, and int16 with a scale for int8 keys) and clear the running state."""
    accumulators, queries, narrow, scales, state, _, zero_sums, _ = _work(c, thread)
    scale = LOG2_E / np.float32(math.sqrt(c[DIM]))
    scale_into(queries, q, c[GROUP] * c[DIM], scale * query_factor(key))
    for g in range(c[GROUP]):
        store_f32(state + 8 * g, NOTHING)
        store_f32(state + 8 * g + 4, ZERO)
        rotate(queries + g * c[DIM] * 4, c[DIM], c[KEY_ROTATION])
        narrow_query(key, queries + g * c[DIM] * 4, c[DIM], narrow + g * c[DIM] * 2, scales + 4 * g)
    clear(accumulators, c[GROUP] * c[PADDED])
    clear(zero_sums, c[GROUP] * _zero_bytes(c) // 4)


@inlined
def _prefetch_bytes(c, fmt, page_distance):  # type: ignore[no-untyped-def]
    """Return how many bytes further on to prefetch: in the next listed page, or in the stream."""
    if page_distance != 0:
        return page_distance * c[COLD_PAGE_BYTES]
    return PREFETCH_FP32_BYTES if fmt == FP32 else PREFETCH_NARROW_BYTES


@inlined
def _scores(c, thread, first, block, key, page, scales_at, bounds, page_distance):  # type: ignore[no-untyped-def]
    """Write the scores of one page's 32 tokens for a block of queries."""
    _, queries, narrow, scales, _, _, _, scores = _work(c, thread)
    units, prefetch_bytes = scores + BLOCK * COLUMNS * 6, _prefetch_bytes(c, key, page_distance)
    dim, stride = c[DIM], COLUMNS * 4
    query, query_bytes, units, extra = key_operands(
        key, first, block, dim, queries, narrow, scales, units, scales_at, bounds, page_distance * c[BOUNDS_PAGE_BYTES]
    )
    rows = rows_at_once(key)
    multiply_page(
        key, block, page, plane_bytes(key, rows), (dim + rows - 1) // rows, query, query_bytes, scores, stride, units, extra,
        prefetch_bytes,
    )  # fmt: skip


@inlined
def _values(c, thread, first, block, value, plane, scales_at, valid, page_distance):  # type: ignore[no-untyped-def]
    """Add the weighted values of one page's tokens to the accumulators of a block of queries."""
    accumulators, _, _, _, _, factors, zero_sums, scores = _work(c, thread)
    weights, units = scores + BLOCK * COLUMNS * 4, scores + BLOCK * COLUMNS * 6
    dim, zero_bytes, out_bytes = c[DIM], _zero_bytes(c), c[PADDED] * 4
    group, prefetch_bytes = scale_group(value, dim, c[VALUE_GROUP]), _prefetch_bytes(c, value, page_distance)
    if page_distance != 0:
        for line in range(0, scale_bytes(value, dim, group, True), LINE_BYTES):
            prefetch_line(scales_at + prefetch_bytes + line)
    out, factor = accumulators + first * out_bytes, factors + 4 * first
    sums, rows = zero_sums + first * zero_bytes, rows_at_once(value)
    source, source_bytes = (weights, COLUMNS * 2) if rows > 1 else (scores, COLUMNS * 4)
    for start in range(0, dim, group):
        weigh_tokens(value, block, start // group, scores, weights, units, scales_at, factor, sums, zero_bytes)
        for column in range(0, group, COLUMNS):
            width = plane_bytes(value, min(COLUMNS, group - column))
            accumulate_page(
                value, block, plane + plane_bytes(value, start + column), width * rows // PAGE_TOKENS,
                (valid + rows - 1) // rows, source, source_bytes, out, out_bytes, units, factor, prefetch_bytes,
            )  # fmt: skip
            out += COLUMNS * 4


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def attend_page(descriptor, thread, key, value, page, bounds, valid, page_distance):  # type: ignore[no-untyped-def]
    """Add the `valid` first tokens of one page to the running softmax of all queries of a group.

    `key` and `value` are its formats, `bounds` is the address of the scales of K's channels. If `page_distance` is not 0, the
    next page is that many pages further on.
    """
    c = words(descriptor)
    _, _, _, _, state, factors, _, scores = _work(c, thread)
    group, dim = c[GROUP], c[DIM]
    values = page + key_plane_bytes(key, dim)
    key_scales = values + plane_bytes(value, dim)
    value_scales = key_scales + scale_bytes(key, dim, dim, False)
    first = np.int64(0)  # typed, or everything below is compiled for the literal 0, too
    while first < group:
        block = min(BLOCK, group - first)
        if block == 3:
            block = 2
        _scores(c, thread, first, block, key, page, key_scales, bounds, page_distance)
        for g in range(block):
            row = scores + g * COLUMNS * 4
            softmax_page(row, valid, state + 8 * (first + g), factors + 4 * (first + g), row)
        _values(c, thread, first, block, value, values, value_scales, valid, page_distance)
        first += block


@inlined
def write_partials(c, thread, value, partial):  # type: ignore[no-untyped-def]
    """Write a thread's accumulators of a group's queries as partial results, with contiguous columns."""
    accumulators, _, _, _, running, _, zero_sums, _ = _work(c, thread)
    dim = c[DIM]
    group = scale_group(value, dim, c[VALUE_GROUP])
    for g in range(c[GROUP]):
        target, source = partial + g * (dim + EXTRA) * 4, accumulators + g * c[PADDED] * 4
        for start in range(0, dim, group):
            sums = zero_sums + g * _zero_bytes(c) + start // group * LANES * 4
            finish_values(value, target + 4 * start, source, group, sums)
            source += (group + COLUMNS - 1) // COLUMNS * COLUMNS * 4
        store_f32(target + 4 * dim, load_f32(running + 8 * g))
        store_f32(target + 4 * dim + 4, load_f32(running + 8 * g + 4))
