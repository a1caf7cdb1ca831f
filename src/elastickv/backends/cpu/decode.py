"""One work item of a decode step: some pages of one KV head. The item that finishes a head last merges its partials.

`c` is a cache's descriptor (see `layout.BufferField`), `descriptor` its address; q, out and lse are addresses of
float32 arrays.
"""

import math

import numpy as np

from elastickv.backends.cpu import layout
from elastickv.backends.cpu.elements import cold_tokens, rotate, steps_since_refresh_at
from elastickv.backends.cpu.intrinsics import (
    atomic_add,
    double_from_bits,
    inlined,
    invoke_8,
    load_f32,
    load_i64,
    store_f32,
    store_i64,
    words,
)
from elastickv.backends.cpu.numba_cache import kernel
from elastickv.backends.cpu.page import prepare, write_partials
from elastickv.backends.cpu.selection import listed_page
from elastickv.backends.cpu.vector import blend, scale_into
from elastickv.recipe import PAGE_TOKENS

_F, _S = layout.BufferField, layout.State
GROUP, DIM, SINKS, STRIDE = int(_F.GROUP), int(_F.DIM), int(_F.SINKS), int(_F.STRIDE)
IS_REUSE, IS_PAGES = int(_F.IS_REUSE), int(_F.IS_PAGES)
COLD_KEY_FORMAT, COLD_VALUE_FORMAT = int(_F.COLD_KEY_FORMAT), int(_F.COLD_VALUE_FORMAT)
COLD_BASE, COLD_PAGE_BYTES = int(_F.COLD_BASE), int(_F.COLD_PAGE_BYTES)
COLD_HEAD_BYTES, COLD_SPLITS = int(_F.COLD_HEAD_BYTES), int(_F.COLD_SPLITS)
BOUNDS_BASE, BOUNDS_HEAD_BYTES = int(_F.BOUNDS_BASE), int(_F.BOUNDS_HEAD_BYTES)
EXACT_FORMAT, EXACT_BASE, EXACT_PAGE_BYTES = int(_F.EXACT_FORMAT), int(_F.EXACT_BASE), int(_F.EXACT_PAGE_BYTES)
EXACT_HEAD_BYTES, EXACT_SPLITS = int(_F.EXACT_HEAD_BYTES), int(_F.EXACT_SPLITS)
SINK_PAGES, RING_PAGES, STATE_BASE = int(_F.SINK_PAGES), int(_F.RING_PAGES), int(_F.STATE_BASE)
VALUE_ROTATION = int(_F.VALUE_ROTATION)
PARTIAL_BASE, REUSED_BASE = int(_F.PARTIAL_BASE), int(_F.REUSED_BASE)
PAGE_KERNEL, LOG2_DECAY = int(_F.PAGE_KERNEL), int(_F.LOG2_DECAY)
LENGTH, STEP, ANCHOR_STEP, PENDING = 8 * int(_S.LENGTH), 8 * int(_S.STEP), 8 * int(_S.ANCHOR_STEP), 8 * int(_S.PENDING)
LISTED, ANCHOR_PAGES, READ_PAGES = 8 * int(_S.LISTED), 8 * int(_S.ANCHOR_PAGES), 8 * int(_S.READ_PAGES)
STATE_BYTES, MIN_PAGES, EXTRA = 8 * layout.STATE_WORDS, layout.SPLIT_MIN_PAGES, layout.PARTIAL_EXTRA
LN_2 = np.float32(math.log(2))
ZERO, ONE, NOTHING = np.float32(0), np.float32(1), np.float32(-np.inf)


@inlined
def _attend_cold(descriptor, thread, head, first, last, tokens):  # type: ignore[no-untyped-def]
    c = words(descriptor)
    state = c[STATE_BASE] + head * STATE_BYTES
    listed, anchor_pages = load_i64(state + LISTED), load_i64(state + ANCHOR_PAGES)
    following = listed_page(c, head, first, listed, anchor_pages) if c[IS_PAGES] else first
    for number in range(first, last):
        page, valid, page_distance = following, PAGE_TOKENS, 0
        following = number + 1
        if c[IS_PAGES]:
            # Listed pages are not adjacent: the list names the next one.
            following = listed_page(c, head, min(number + 1, last - 1), listed, anchor_pages)
            page_distance = following - page
        else:
            valid = min(PAGE_TOKENS, tokens - page * PAGE_TOKENS)
        where = c[COLD_BASE] + head * c[COLD_HEAD_BYTES] + page * c[COLD_PAGE_BYTES]
        bounds = c[BOUNDS_BASE] + head * c[BOUNDS_HEAD_BYTES] + page * c[DIM] * 4
        invoke_8(
            c[PAGE_KERNEL], descriptor, thread, c[COLD_KEY_FORMAT], c[COLD_VALUE_FORMAT], where, bounds, valid, page_distance
        )


@inlined
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
        invoke_8(c[PAGE_KERNEL], descriptor, thread, c[EXACT_FORMAT], c[EXACT_FORMAT], where, 0, valid, 0)


@inlined
def _share(pages, splits, split):  # type: ignore[no-untyped-def]
    """Return the first and last page of a split: equal shares of the pages, none below a minimum size."""
    size = max((pages + splits - 1) // splits, MIN_PAGES)
    return min(pages, split * size), min(pages, (split + 1) * size)


@inlined
def merge_partial(out, top, total, partial, dim, weight):  # type: ignore[no-untyped-def]
    """Merge one partial, with `weight` added to its log-sum-exp, into (out, top, total); return the new top and total."""
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


@inlined
def _store_reused(reused, out, top, total, dim):  # type: ignore[no-untyped-def]
    if total != ZERO:
        scale_into(reused, out, dim, ONE)
    store_f32(reused + 4 * dim, top)
    store_f32(reused + 4 * dim + 4, total)


@inlined
def _merge(c, head, out, lse):  # type: ignore[no-untyped-def]
    """Merge a head's partials in the order of their splits, so that the result does not depend on the threads."""
    splits, group, dim = c[COLD_SPLITS] + c[EXACT_SPLITS], c[GROUP], c[DIM]
    row = (dim + EXTRA) * 4
    state = c[STATE_BASE] + head * STATE_BYTES
    length, step = load_i64(state + LENGTH), load_i64(state + STEP)
    steps_since_refresh = steps_since_refresh_at(c, step)
    cold = cold_tokens(c, length)
    weight = ZERO
    if c[STRIDE] > 1 and cold > 0:
        # Each kept token stands for cold / kept of them.
        weight = np.float32(math.log2(cold / ((cold + c[STRIDE] - 1) // c[STRIDE])))
    for g in range(group):
        target, top, total = out + g * dim * 4, NOTHING, ZERO
        reused = c[REUSED_BASE] + (head * group + g) * row
        if c[IS_REUSE] and steps_since_refresh > 0:
            top, total = merge_partial(
                target, top, total, reused, dim, np.float32(steps_since_refresh * double_from_bits(c[LOG2_DECAY]))
            )
        for split in range(splits):
            partial = c[PARTIAL_BASE] + ((head * splits + split) * group + g) * row
            if split == c[COLD_SPLITS] and c[IS_REUSE] and steps_since_refresh == 0:
                _store_reused(reused, target, top, total, dim)
            top, total = merge_partial(target, top, total, partial, dim, weight if split < c[COLD_SPLITS] else ZERO)
        if c[IS_REUSE] and steps_since_refresh == 0 and c[EXACT_SPLITS] == 0:
            _store_reused(reused, target, top, total, dim)
        if total == ZERO:
            for d in range(dim):
                store_f32(target + 4 * d, ZERO)
        else:
            scale_into(target, target, dim, ONE / total)
            rotate(target, dim, c[VALUE_ROTATION])
        store_f32(lse + 4 * g, (top + np.log2(total)) * LN_2)
    if c[IS_REUSE] and steps_since_refresh == 0:
        store_i64(state + ANCHOR_STEP, step)
    store_i64(state + READ_PAGES, cold // PAGE_TOKENS)


@kernel("void(int64, int64, int64, int64, int64, int64)")
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
    cold_part = split < c[COLD_SPLITS]
    if cold_part:
        tokens = (cold + c[STRIDE] - 1) // c[STRIDE]
        steps_since_refresh, skipped = steps_since_refresh_at(c, step), 0
        if c[IS_REUSE] and steps_since_refresh > 0:
            skipped = cold_tokens(c, length - steps_since_refresh) // PAGE_TOKENS
        pages = (tokens + PAGE_TOKENS - 1) // PAGE_TOKENS - skipped
        if c[IS_PAGES]:
            pages += load_i64(state + LISTED) - load_i64(state + ANCHOR_PAGES)
        first, last = _share(pages, c[COLD_SPLITS], split)
        if first < last:
            prepare(c, thread, q + query_bytes, c[COLD_KEY_FORMAT])
            _attend_cold(descriptor, thread, head, first + skipped, last + skipped, tokens)
    else:
        sinks = min(length, c[SINKS])
        pages = (sinks + PAGE_TOKENS - 1) // PAGE_TOKENS + (length - sinks - cold + PAGE_TOKENS - 1) // PAGE_TOKENS
        first, last = _share(pages, c[EXACT_SPLITS], split - c[COLD_SPLITS])
        if first < last:
            prepare(c, thread, q + query_bytes, c[EXACT_FORMAT])
            _attend_exact(descriptor, thread, head, first, last, length, cold)
    if first < last:
        write_partials(c, thread, c[COLD_VALUE_FORMAT] if cold_part else c[EXACT_FORMAT], partial)
    else:
        for g in range(group):
            store_f32(partial + g * row + 4 * dim, NOTHING)
            store_f32(partial + g * row + 4 * dim + 4, ZERO)
    if atomic_add(state + PENDING, 1) == splits - 1:
        store_i64(state + PENDING, 0)
        _merge(c, head, out + query_bytes, lse + head * group * 4)
