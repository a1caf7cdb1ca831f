"""Page selection at an anchor: the scores of all pages (`kvcache.scorers`, in float32) and the list of the best."""

import hashlib
from functools import cache
from threading import Lock
from types import CodeType, FunctionType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, types

from elastickv.backends.cpu import layout
from elastickv.backends.cpu.elements import RANGE_FACTORS, cold_tokens, rotate
from elastickv.backends.cpu.intrinsics import (
    FLOAT_BYTES,
    I32,
    I64,
    LANES,
    VF,
    VI,
    WIDTHS,
    addressed,
    atomic_add,
    by_width,
    constant,
    floats,
    inlined,
    invoke_4,
    load,
    load_f64,
    load_i32,
    load_i64,
    loop,
    multiply_add,
    reduce,
    splat,
    store,
    store_f32,
    store_i32,
    store_i64,
    words,
)
from elastickv.backends.cpu.numba_cache import cache_kernels_on_disk, kernel
from elastickv.backends.cpu.scale_folding import halves
from elastickv.backends.cpu.vector import scale_into
from elastickv.kvcache.scorers import Scorer
from elastickv.recipe import PAGE_TOKENS

_F, _S = layout.BufferField, layout.State
KV_HEADS, GROUP, DIM, COLD_KEY_FORMAT = int(_F.KV_HEADS), int(_F.GROUP), int(_F.DIM), int(_F.COLD_KEY_FORMAT)
BOUNDS_BASE, BOUNDS_HEAD_BYTES, STATE_BASE = int(_F.BOUNDS_BASE), int(_F.BOUNDS_HEAD_BYTES), int(_F.STATE_BASE)
LISTS_BASE, LISTS_HEAD_BYTES = int(_F.LISTS_BASE), int(_F.LISTS_HEAD_BYTES)
SCORES_BASE, SCORES_HEAD_BYTES, SCORE_SPLITS = int(_F.SCORES_BASE), int(_F.SCORES_HEAD_BYTES), int(_F.SCORE_SPLITS)
PADDED, KEY_ROTATION = int(_F.PADDED), int(_F.KEY_ROTATION)
WEIGHTS_KERNEL = int(_F.WEIGHTS_KERNEL)
FRACTIONS_BASE, WORK_BASE, WORK_THREAD_BYTES = int(_F.FRACTIONS_BASE), int(_F.WORK_BASE), int(_F.WORK_THREAD_BYTES)
LENGTH, STEP, PENDING, LISTED = 8 * int(_S.LENGTH), 8 * int(_S.STEP), 8 * int(_S.PENDING), 8 * int(_S.LISTED)
ANCHOR_STEP, ANCHOR_PAGES = 8 * int(_S.ANCHOR_STEP), 8 * int(_S.ANCHOR_PAGES)
STATE_BYTES = 8 * layout.STATE_WORDS
NOTHING, ONE = np.float32(-np.inf), np.float32(1)
LEAST_KEY, GREATEST_KEY = -(1 << 31), (1 << 31) - 1
MOST_PAGES = WIDTHS[-1]


def _score(builder: ir.IRBuilder, code: int, width: int, args: tuple[Any, ...]) -> None:
    bounds, dim, queries, weights, out = args
    page_bytes = builder.mul(dim, I64(4))
    with loop(builder, builder.sdiv(dim, I64(LANES)), [constant(0.0)] * (2 * width)) as (index, sums, final):
        at = builder.mul(index, I64(FLOAT_BYTES * LANES))
        query, weight = load(builder, queries, VF, at), load(builder, weights, VF, at)
        for page in range(width):
            where = builder.add(builder.mul(index, I64(2 * LANES)), builder.mul(page_bytes, I64(page)))
            scale = halves(builder, bounds, where)
            zero = halves(builder, bounds, builder.add(where, builder.mul(dim, I64(2))))
            sums[2 * page] = multiply_add(builder, query, zero, sums[2 * page])
            sums[2 * page + 1] = multiply_add(builder, weight, scale, sums[2 * page + 1])
    for page in range(width):
        total = reduce(builder, builder.fadd(final[2 * page], final[2 * page + 1]), builder.fadd)
        store(builder, total, out, page * FLOAT_BYTES)


# (0, pages, bounds, head_dim, queries, weights, out): queries . zero + weights . scale of consecutive pages.
score_pages = addressed(7, types.void, by_width([0], _score))


def _order(builder: ir.IRBuilder, row: Any, vectors: Any) -> None:
    with loop(builder, vectors, []) as (index, _, _):
        where = builder.mul(index, I64(LANES * FLOAT_BYTES))
        bits = load(builder, row, VI, where)
        sign = builder.ashr(bits, ir.Constant(VI, [31] * LANES))
        store(builder, builder.xor(bits, builder.and_(sign, ir.Constant(VI, [0x7FFFFFFF] * LANES))), row, where)


def _count(builder: ir.IRBuilder, row: Any, vectors: Any, key: Any) -> Any:
    keys = splat(builder, builder.trunc(key, I32))
    with loop(builder, vectors, [ir.Constant(VI, [0] * LANES)]) as (index, carried, final):
        where = builder.mul(index, I64(LANES * FLOAT_BYTES))
        reached = builder.icmp_signed(">=", load(builder, row, VI, where), keys)
        carried[0] = builder.sub(carried[0], builder.sext(reached, VI))
    return builder.sext(reduce(builder, final[0], builder.add), I64)


# (row, vectors): turn float32 scores into int32 keys of the same order. (row, vectors, key): how many keys are at least `key`.
_order_row = addressed(2, types.void, _order)
_count_from = addressed(3, types.int64, _count)


@inlined
def listed_page(c, head, number, listed, anchor_pages):  # type: ignore[no-untyped-def]
    """Return the `number`-th page that a step reads: the listed ones, then those that have become cold since."""
    if number >= listed:
        return anchor_pages + number - listed
    return np.int64(load_i32(c[LISTS_BASE] + head * c[LISTS_HEAD_BYTES] + 4 * number))


@inlined
def list_best(scores, pages, count, target):  # type: ignore[no-untyped-def]
    """List the `count` pages of highest score in ascending order, the first of equals. Return how many are listed."""
    vectors = (pages + LANES - 1) // LANES
    for number in range(pages, vectors * LANES):
        store_f32(scores + 4 * number, NOTHING)
    _order_row(scores, vectors)
    low, high = LEAST_KEY, GREATEST_KEY
    while low < high:
        middle = (low + high + 1) >> 1
        if _count_from(scores, vectors, middle) >= count:
            low = middle
        else:
            high = middle - 1
    equals = count - (_count_from(scores, vectors, low + 1) if low < GREATEST_KEY else 0)
    listed = 0
    for page in range(pages):
        key = np.int64(load_i32(scores + 4 * page))
        if key > low or (key == low and equals > 0):
            if key == low:
                equals -= 1
            store_i32(target + 4 * listed, page)
            listed += 1
    return listed


def _write_weights(q, group, dim, target):  # type: ignore[no-untyped-def]
    """Write what a page's zeros are multiplied by, then what its scales are, for a group's queries."""
    queries = carray(floats(q), (group, dim))
    for d in range(dim):
        zero_weight, scale_weight = channel_weights(queries[:, d])  # type: ignore[name-defined]  # noqa: F821
        store_f32(target + 4 * d, zero_weight)
        store_f32(target + 4 * (dim + d), scale_weight)


def weights_kernel(scorer: Scorer) -> Any:
    """Return `_write_weights` compiled with a scorer's `channel_weights`: a kernel of (queries, group, head_dim, target)."""
    with _compiling:
        return _compiled_weights(scorer)


_compiling = Lock()


@cache
def _compiled_weights(scorer: Scorer) -> Any:
    # Numba caches compiled code under a function's name: the name gets a digest of what the scorer computes. A function made by
    # another function also computes with that one's variables, which no digest of its code tells: it stays in memory.
    code = scorer.channel_weights.__code__
    on_disk = not code.co_freevars and str(scorer.channel_weights.__module__).startswith("elastickv.")
    scope = dict(globals(), channel_weights=inlined(scorer.channel_weights))
    function = FunctionType(_write_weights.__code__, scope, _write_weights.__name__)
    digest = _digest(code, scorer.channel_weights.__globals__)
    function.__qualname__ = f"_write_weights_{scorer.name}_{digest}"
    with cache_kernels_on_disk():
        return cfunc("void(int64, int64, int64, int64)", cache=on_disk, error_model="numpy")(function)


def _digest(code: CodeType, scope: dict[str, Any]) -> str:
    """Return a digest of a function's instructions and of the numbers that it reads from its module."""
    numbers = {name: repr(scope[name]) for name in code.co_names if isinstance(scope.get(name), (int, float, np.generic))}
    return hashlib.sha256(repr((code.co_code, code.co_consts, code.co_names, numbers)).encode()).hexdigest()[:12]


@kernel("void(int64, int64, int64, int64)")
def score_item(descriptor, item, q, thread):  # type: ignore[no-untyped-def]
    """Score some pages of one KV head for its queries; the item that finishes the head last lists its best pages."""
    c = words(descriptor)
    head, split = item // c[SCORE_SPLITS], item % c[SCORE_SPLITS]
    state = c[STATE_BASE] + head * STATE_BYTES
    group, dim = c[GROUP], c[DIM]
    pages = cold_tokens(c, load_i64(state + LENGTH)) // PAGE_TOKENS
    share = (pages + c[SCORE_SPLITS] - 1) // c[SCORE_SPLITS]
    scores = c[SCORES_BASE] + head * c[SCORES_HEAD_BYTES]
    queries = c[WORK_BASE] + thread * c[WORK_THREAD_BYTES]
    page, last = split * share, min(pages, (split + 1) * share)
    if page < last:
        source = q + head * group * dim * 4
        if c[KEY_ROTATION] > 0:
            rotated = queries + group * (c[PADDED] + dim) * 4  # behind the weights of any group
            scale_into(rotated, source, group * dim, ONE)
            for g in range(group):
                rotate(rotated + g * dim * 4, dim, c[KEY_ROTATION])
            source = rotated
        invoke_4(c[WEIGHTS_KERNEL], source, group, dim, queries)
        of_scales = queries + dim * 4
        scale_into(of_scales, of_scales, dim, RANGE_FACTORS[c[COLD_KEY_FORMAT]])
    while page < last:
        width = MOST_PAGES if page + MOST_PAGES <= last else 1
        bounds = c[BOUNDS_BASE] + head * c[BOUNDS_HEAD_BYTES] + page * dim * 4
        score_pages(0, width, bounds, dim, queries, queries + dim * 4, scores + 4 * page)
        page += width
    if atomic_add(state + PENDING, 1) == c[SCORE_SPLITS] - 1:
        store_i64(state + PENDING, 0)
        listed = 0
        if pages > 0:
            wanted = np.int64(load_f64(c[FRACTIONS_BASE] + 8 * (head % c[KV_HEADS])) * pages)
            target = c[LISTS_BASE] + head * c[LISTS_HEAD_BYTES]
            listed = list_best(scores, pages, min(pages, max(1, wanted)), target)
        store_i64(state + LISTED, listed)
        store_i64(state + ANCHOR_PAGES, pages)
        store_i64(state + ANCHOR_STEP, load_i64(state + STEP))
