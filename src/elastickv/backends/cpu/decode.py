"""One work item of a decode step: some pages of one KV head, and the merge by whoever finishes that head last.

`c` is a cache's descriptor (see `layout.Field`), `descriptor` its address; q, out and lse are addresses of float32 arrays.
"""

import math

import numpy as np
from numba import cfunc, njit

from elastickv.backends.cpu import layout
from elastickv.backends.cpu.intrinsics import (
    BLOCK,
    COLUMNS,
    FP32,
    INT8,
    atomic_add,
    double_from_bits,
    invoke_5,
    load_f32,
    load_i64,
    store_f32,
    store_i64,
    store_u16,
    words,
)
from elastickv.backends.cpu.storage import cold_tokens, element_bytes
from elastickv.backends.cpu.vector import (
    accumulate_page,
    blend,
    multiply_page,
    scale_into,
    softmax_page,
    softmax_page_int8,
)
from elastickv.recipe import PAGE_TOKENS

_F = layout.Field
HEADS, KV_HEADS, GROUP, DIM = int(_F.HEADS), int(_F.KV_HEADS), int(_F.GROUP), int(_F.DIM)
SINKS, WINDOW, STRIDE, ANCHOR_EVERY = int(_F.SINKS), int(_F.WINDOW), int(_F.STRIDE), int(_F.ANCHOR_EVERY)
IS_DENSE, IS_REUSE = int(_F.IS_DENSE), int(_F.IS_REUSE)
COLD_FORMAT, COLD_BASE, COLD_PAGE_BYTES = int(_F.COLD_FORMAT), int(_F.COLD_BASE), int(_F.COLD_PAGE_BYTES)
COLD_HEAD_BYTES, COLD_SPLITS = int(_F.COLD_HEAD_BYTES), int(_F.COLD_SPLITS)
EXACT_FORMAT, EXACT_BASE, EXACT_PAGE_BYTES = int(_F.EXACT_FORMAT), int(_F.EXACT_BASE), int(_F.EXACT_PAGE_BYTES)
EXACT_HEAD_BYTES, EXACT_SPLITS = int(_F.EXACT_HEAD_BYTES), int(_F.EXACT_SPLITS)
SINK_PAGES, RING_PAGES, STATE_BASE = int(_F.SINK_PAGES), int(_F.RING_PAGES), int(_F.STATE_BASE)
PARTIAL_BASE, REUSED_BASE = int(_F.PARTIAL_BASE), int(_F.REUSED_BASE)
PAGE_KERNEL, LOG2_DECAY = int(_F.PAGE_KERNEL), int(_F.LOG2_DECAY)
WORK_BASE, WORK_THREAD_BYTES = int(_F.WORK_BASE), int(_F.WORK_THREAD_BYTES)
LENGTH, STEP = 8 * int(layout.State.LENGTH), 8 * int(layout.State.STEP)
ANCHOR_STEP, PENDING = 8 * int(layout.State.ANCHOR_STEP), 8 * int(layout.State.PENDING)
STATE_BYTES, MIN_PAGES, EXTRA = 8 * layout.STATE_WORDS, layout.SPLIT_MIN_PAGES, layout.PARTIAL_EXTRA
LOG2_E, LN_2 = np.float32(1 / math.log(2)), np.float32(math.log(2))
ZERO, ONE, NOTHING = np.float32(0), np.float32(1), np.float32(-np.inf)
INT16_MAX = np.float32(32767)
# Prefetch distances: the processor's own prefetchers do most; further ahead, software's requests fill their queues.
AHEAD_FP32_BYTES, AHEAD_NARROW_BYTES = 512, 2048


@njit(error_model="numpy")
def _work(c, thread):  # type: ignore[no-untyped-def]
    """Return the addresses of a thread's scratch: accumulators, queries, int16 queries, their scales, state, factors, block."""
    accumulators = c[WORK_BASE] + thread * c[WORK_THREAD_BYTES]
    padded = (c[DIM] + COLUMNS - 1) // COLUMNS * COLUMNS
    queries = accumulators + c[GROUP] * padded * 4
    narrow = queries + c[GROUP] * c[DIM] * 4
    scales = narrow + c[GROUP] * c[DIM] * 2
    state = scales + c[GROUP] * 4
    factors = state + c[GROUP] * 8
    return accumulators, padded, queries, narrow, scales, state, factors, factors + c[GROUP] * 4


@njit(error_model="numpy")
def _prepare(c, thread, q, fmt):  # type: ignore[no-untyped-def]
    """Scale a group's queries (float32, and int16 with a scale for int8 rows) and clear the running state."""
    accumulators, padded, queries, narrow, scales, state, _, _ = _work(c, thread)
    scale = LOG2_E / np.float32(math.sqrt(c[DIM]))
    scale_into(queries, q, c[GROUP] * c[DIM], scale)
    for g in range(c[GROUP]):
        store_f32(state + 8 * g, NOTHING)
        store_f32(state + 8 * g + 4, ZERO)
        if fmt == INT8:
            row, peak, total = queries + g * c[DIM] * 4, ZERO, ZERO
            for d in range(c[DIM]):
                x = load_f32(row + 4 * d)
                peak, total = max(peak, abs(x)), total + x
            inverse = INT16_MAX / peak if peak > np.float32(1e-30) else ZERO
            for d in range(c[DIM]):
                store_u16(narrow + (g * c[DIM] + d) * 2, np.uint16(np.int64(np.rint(load_f32(row + 4 * d) * inverse)) & 0xFFFF))
            # A NaN or infinity in the query reaches the scores through the scale.
            store_f32(scales + 4 * g, peak / INT16_MAX + ZERO * total)
    for i in range(c[GROUP] * padded):
        store_f32(accumulators + 4 * i, ZERO)


@cfunc("void(int64, int64, int64, int64, int64)", cache=True, error_model="numpy")
def attend_page(descriptor, thread, fmt, page, valid):  # type: ignore[no-untyped-def]
    """Add the `valid` first tokens of one page to the running softmax of all queries of a group."""
    c = words(descriptor)
    accumulators, padded, queries, narrow, scales, state, factors, scores = _work(c, thread)
    weights, weight_scales = scores + BLOCK * COLUMNS * 4, scores + BLOCK * COLUMNS * 6
    group, dim = c[GROUP], c[DIM]
    width = element_bytes(fmt)
    ahead = AHEAD_FP32_BYTES if fmt == FP32 else AHEAD_NARROW_BYTES
    plane = PAGE_TOKENS * dim * width
    first = 0
    while first < group:
        block = min(BLOCK, group - first)
        if block == 3:
            block = 2
        if fmt == INT8:
            query = narrow + first * dim * 2
            multiply_page(
                fmt, block, page, 2 * COLUMNS, dim // 2, query, dim * 2, scores, COLUMNS * 4, scales + 4 * first, 0, ahead
            )
        else:
            query = queries + first * dim * 4
            multiply_page(fmt, block, page, COLUMNS * width, dim, query, dim * 4, scores, COLUMNS * 4, scales, 0, ahead)
        for g in range(block):
            row, running, factor = scores + g * COLUMNS * 4, state + 8 * (first + g), factors + 4 * g
            if fmt == INT8:
                softmax_page_int8(
                    row, valid, running, factor, page + 2 * plane, weights + g * COLUMNS * 2, weight_scales + 4 * g
                )
            else:
                softmax_page(row, valid, running, factor, row)
        for column in range(0, dim, COLUMNS):
            columns = min(COLUMNS, dim - column)
            chunk, out = page + plane + column * PAGE_TOKENS * width, accumulators + (first * padded + column) * 4
            if fmt == INT8:
                accumulate_page(
                    fmt, block, chunk, 2 * columns, (valid + 1) // 2, weights, COLUMNS * 2, out, padded * 4,
                    weight_scales, factors, ahead,
                )  # fmt: skip
            else:
                accumulate_page(
                    fmt, block, chunk, columns * width, valid, scores, COLUMNS * 4, out, padded * 4,
                    scales, factors, ahead,
                )  # fmt: skip
        first += block


@njit(error_model="numpy")
def _attend_cold(descriptor, thread, head, first, last, tokens):  # type: ignore[no-untyped-def]
    c = words(descriptor)
    for page in range(first, last):
        where = c[COLD_BASE] + head * c[COLD_HEAD_BYTES] + page * c[COLD_PAGE_BYTES]
        valid = min(PAGE_TOKENS, tokens - page * PAGE_TOKENS)
        invoke_5(c[PAGE_KERNEL], descriptor, thread, c[COLD_FORMAT], where, valid)


@njit(error_model="numpy")
def _attend_exact(descriptor, thread, head, first, last, length, cold):  # type: ignore[no-untyped-def]
    c = words(descriptor)
    sinks = min(length, c[SINKS])
    sink_pages = (sinks + PAGE_TOKENS - 1) // PAGE_TOKENS
    for i in range(first, last):
        if i < sink_pages:
            slot, valid = i, min(PAGE_TOKENS, sinks - i * PAGE_TOKENS)
        else:
            page = cold // PAGE_TOKENS + i - sink_pages
            slot = c[SINK_PAGES] + page % c[RING_PAGES]
            valid = min(PAGE_TOKENS, length - sinks - page * PAGE_TOKENS)
        where = c[EXACT_BASE] + head * c[EXACT_HEAD_BYTES] + slot * c[EXACT_PAGE_BYTES]
        invoke_5(c[PAGE_KERNEL], descriptor, thread, c[EXACT_FORMAT], where, valid)


@njit(error_model="numpy")
def _share(pages, splits, split):  # type: ignore[no-untyped-def]
    """Return the first and last page of a split: equal shares of what there is, none below a least size."""
    size = max((pages + splits - 1) // splits, MIN_PAGES)
    return min(pages, split * size), min(pages, (split + 1) * size)


@njit(error_model="numpy")
def _fold(out, top, total, partial, dim, weight):  # type: ignore[no-untyped-def]
    """Merge one partial, its log-sum-exp moved by `weight`, into (out, top, total); return the new top and total."""
    other, mass = load_f32(partial + 4 * dim) + weight, load_f32(partial + 4 * dim + 4)
    if mass == ZERO:
        return top, total
    if total == ZERO:
        scale_into(out, partial, dim, ONE)
        return other, mass
    new = max(top, other)
    old_factor, factor = np.exp2(top - new), np.exp2(other - new)
    blend(out, partial, dim, old_factor, factor)
    return new, total * old_factor + mass * factor


@njit(error_model="numpy")
def _keep(reused, out, top, total, dim):  # type: ignore[no-untyped-def]
    if total != ZERO:
        scale_into(reused, out, dim, ONE)
    store_f32(reused + 4 * dim, top)
    store_f32(reused + 4 * dim + 4, total)


@njit(error_model="numpy")
def _merge(c, head, out, lse):  # type: ignore[no-untyped-def]
    """Merge a head's partials in the order of their splits, so that the result depends on no thread."""
    splits, group, dim = c[COLD_SPLITS] + c[EXACT_SPLITS], c[GROUP], c[DIM]
    row = (dim + EXTRA) * 4
    state = c[STATE_BASE] + head * STATE_BYTES
    length, step = load_i64(state + LENGTH), load_i64(state + STEP)
    age = max(step, 0) % c[ANCHOR_EVERY]
    cold = cold_tokens(c, length)
    weight = ZERO
    if c[STRIDE] > 1 and cold > 0:
        # Each kept token stands for cold / kept of them.
        weight = np.float32(math.log2(cold / ((cold + c[STRIDE] - 1) // c[STRIDE])))
    for g in range(group):
        target, top, total = out + g * dim * 4, NOTHING, ZERO
        reused = c[REUSED_BASE] + (head * group + g) * row
        if age > 0:
            top, total = _fold(target, top, total, reused, dim, np.float32(age * double_from_bits(c[LOG2_DECAY])))
        for split in range(splits):
            partial = c[PARTIAL_BASE] + ((head * splits + split) * group + g) * row
            if split == c[COLD_SPLITS] and c[IS_REUSE] and age == 0:
                _keep(reused, target, top, total, dim)
            top, total = _fold(target, top, total, partial, dim, weight if split < c[COLD_SPLITS] else ZERO)
        if c[IS_REUSE] and age == 0 and c[EXACT_SPLITS] == 0:
            _keep(reused, target, top, total, dim)
        if total == ZERO:
            for d in range(dim):
                store_f32(target + 4 * d, ZERO)
        else:
            scale_into(target, target, dim, ONE / total)
        store_f32(lse + 4 * g, (top + np.log2(total)) * LN_2)
    if c[IS_REUSE] and age == 0:
        store_i64(state + ANCHOR_STEP, step)


@cfunc("void(int64, int64, int64, int64, int64, int64)", cache=True, error_model="numpy")
def decode_item(descriptor, item, q, out, lse, thread):  # type: ignore[no-untyped-def]
    """Attend with the queries of one KV head to one split of its pages; the last split to finish merges them all."""
    c = words(descriptor)
    splits = c[COLD_SPLITS] + c[EXACT_SPLITS]
    head, split = item // splits, item % splits
    state = c[STATE_BASE] + head * STATE_BYTES
    length, step = load_i64(state + LENGTH), load_i64(state + STEP)
    group, dim = c[GROUP], c[DIM]
    cold = cold_tokens(c, length)
    query_bytes = head * group * dim * 4
    row = (dim + EXTRA) * 4
    partial = c[PARTIAL_BASE] + (head * splits + split) * group * row
    if split < c[COLD_SPLITS]:
        tokens = (cold + c[STRIDE] - 1) // c[STRIDE]
        age = max(step, 0) % c[ANCHOR_EVERY]
        skipped = cold_tokens(c, length - age) // PAGE_TOKENS if age > 0 else 0
        pages = (tokens + PAGE_TOKENS - 1) // PAGE_TOKENS - skipped
        first, last = _share(pages, c[COLD_SPLITS], split)
        if first < last:
            _prepare(c, thread, q + query_bytes, c[COLD_FORMAT])
            _attend_cold(descriptor, thread, head, first + skipped, last + skipped, tokens)
    else:
        sinks = min(length, c[SINKS])
        pages = (sinks + PAGE_TOKENS - 1) // PAGE_TOKENS + (length - sinks - cold + PAGE_TOKENS - 1) // PAGE_TOKENS
        first, last = _share(pages, c[EXACT_SPLITS], split - c[COLD_SPLITS])
        if first < last:
            _prepare(c, thread, q + query_bytes, c[EXACT_FORMAT])
            _attend_exact(descriptor, thread, head, first, last, length, cold)
    accumulators, padded, _, _, _, running, _, _ = _work(c, thread)
    for g in range(group):
        target = partial + g * row
        if first < last:
            scale_into(target, accumulators + g * padded * 4, dim, ONE)
            store_f32(target + 4 * dim, load_f32(running + 8 * g))
            store_f32(target + 4 * dim + 4, load_f32(running + 8 * g + 4))
        else:
            store_f32(target + 4 * dim, NOTHING)
            store_f32(target + 4 * dim + 4, ZERO)
    if atomic_add(state + PENDING, 1) == splits - 1:
        store_i64(state + PENDING, 0)
        _merge(c, head, out + query_bytes, lse + head * group * 4)
