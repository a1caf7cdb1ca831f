"""The vector kernels that a page of 32 tokens goes through, for up to 4 query heads at a time.

`multiply_page` is sum over rows of coefficient x row: scores when rows are the elements of K (stored transposed, so that
32 tokens fill vector registers and nothing is reduced across lanes), and weighted values when rows are tokens.
`softmax_page` is one step of the online softmax (Milakov and Gimelshein 2018).

Integer rows are multiplied by 16-bit integers (`fold` makes them): int8 in pairs of rows, int4 in eights, int2 in 16 and int3
in 32.
"""

from typing import Any

from llvmlite import ir
from numba import types

from elastickv.backends.cpu.intrinsics import (
    F32,
    FLOAT_BYTES,
    FORMAT_CODES,
    HALVES,
    I32,
    I64,
    LANES,
    VF,
    VI,
    addressed,
    by_width,
    constant,
    exp2,
    larger,
    load,
    loop,
    multiply_add,
    prefetch,
    reduce,
    splat,
    store,
)
from elastickv.backends.cpu.page_operands import BIASED, INTEGERS, PAIRS, ROW_BYTES, SCALED, load_row, scaled
from elastickv.recipe import FORMATS

LINE_BYTES = 64


def _multiply_pairs(builder: ir.IRBuilder, a: Any, b: Any, total: Any) -> Any:
    """Return total + a[2i] * b[2i] + a[2i+1] * b[2i+1] in int32: PMADDWD, or VPDPWSSD where there is one."""
    wide = ir.VectorType(I32, 2 * LANES)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    even, odd = (
        builder.shuffle_vector(product, product, ir.Constant(VI, list(range(first, 2 * LANES, 2)))) for first in (0, 1)
    )
    return builder.add(total, builder.add(even, odd))


def _multiply(builder: ir.IRBuilder, fmt: int, width: int, accumulate: bool, args: tuple[Any, ...]) -> None:
    base, row_bytes, count, coefficients, query_bytes, out, out_bytes, scales, extra, prefetch_bytes = args
    integer = fmt in INTEGERS
    zero = ir.Constant(VI if integer else VF, [0] * LANES)
    with loop(builder, count, [zero] * (HALVES * width)) as (index, sums, final):
        row = builder.add(base, builder.mul(index, row_bytes))
        steps = load_row(builder, fmt, row, row_bytes)
        for line in range(0, ROW_BYTES.get(fmt, LINE_BYTES), LINE_BYTES):
            prefetch(builder, row, builder.add(prefetch_bytes, I64(line)))
        first = builder.mul(index, I64(FLOAT_BYTES * len(steps)))
        for query in range(width):
            start = builder.add(first, builder.mul(query_bytes, I64(query)))
            for i, operands in enumerate(steps):
                where = builder.add(start, I64(FLOAT_BYTES * i))
                coefficient = splat(builder, load(builder, coefficients, I32 if integer else F32, where))
                pair = builder.bitcast(coefficient, PAIRS) if integer else coefficient
                for half in range(HALVES):
                    n = query * HALVES + half
                    sums[n] = (_multiply_pairs if integer else multiply_add)(builder, operands[half], pair, sums[n])
    for query in range(width):
        scale = splat(builder, load(builder, scales, F32, query * FLOAT_BYTES)) if fmt in SCALED else None
        added = splat(builder, load(builder, extra, F32, query * FLOAT_BYTES)) if accumulate or fmt in BIASED else None
        for half in range(HALVES):
            value = final[query * HALVES + half]
            where = builder.add(builder.mul(out_bytes, I64(query)), I64(half * LANES * FLOAT_BYTES))
            value = scaled(builder, fmt, value, accumulate, scale, added, extra, half)
            if accumulate:
                value = multiply_add(builder, load(builder, out, VF, where), added, value)
            store(builder, value, out, where)


def _multiply_any(accumulate: bool) -> Any:
    layouts = {code: FORMATS[name].values if accumulate else FORMATS[name].keys for name, code in FORMAT_CODES.items()}
    return by_width(
        [code for code, layout in layouts.items() if layout is not None],
        lambda builder, fmt, width, args: _multiply(builder, fmt, width, accumulate, args),
    )


# (format, width, base, row_bytes, rows, coefficients, query_bytes, out, out_bytes, scales, extra, prefetch_bytes): addresses
# and byte counts; data `prefetch_bytes` further on is prefetched. `scales`: one float for each query, of integers and fp8.
# multiply_page: out[query] = scale x sum; `extra`: for int8 the tokens' bf16 scales, for scales of channels a float to add for
# each query.
# accumulate_page: out[query] = extra[query] x out[query] + scale x sum.
multiply_page = addressed(12, types.void, _multiply_any(False))
accumulate_page = addressed(12, types.void, _multiply_any(True))


def _softmax(builder: ir.IRBuilder, scores: Any, valid: Any, state: Any, factor: Any, weights: Any) -> None:
    lanes = [ir.Constant(VI, list(range(h * LANES, (h + 1) * LANES))) for h in range(HALVES)]
    limit = splat(builder, builder.trunc(valid, I32))
    values = []
    for half, lane in enumerate(lanes):
        value = load(builder, scores, VF, half * LANES * FLOAT_BYTES)
        values.append(builder.select(builder.icmp_signed("<", lane, limit), value, constant(float("-inf"))))
    old_top, old_total = load(builder, state, F32), load(builder, state, F32, FLOAT_BYTES)
    top = reduce(builder, larger(builder, *values), lambda a, b: larger(builder, a, b))
    top = larger(builder, old_top, top)
    tops = splat(builder, top)
    exps = [exp2(builder, builder.fsub(value, tops)) for value in values]
    total = reduce(builder, builder.fadd(*exps), builder.fadd)
    for half, weight in enumerate(exps):
        store(builder, weight, weights, half * LANES * FLOAT_BYTES)
    store(builder, top, state)
    store(builder, F32(1.0), factor)
    store(builder, builder.fadd(old_total, total), state, FLOAT_BYTES)
    # A new maximum is rare after the first pages. Not "greater": a NaN must go this way, too.
    with builder.if_then(builder.fcmp_unordered("!=", old_top, top), likely=False):
        rescale = builder.extract_element(exp2(builder, splat(builder, builder.fsub(old_top, top))), I32(0))
        store(builder, builder.fadd(builder.fmul(old_total, rescale), total), state, FLOAT_BYTES)
        store(builder, rescale, factor)


# (scores, valid tokens, state: running maximum and sum, factor on what was accumulated before, weights): float32.
softmax_page = addressed(5, types.void, _softmax)


def _blend(builder: ir.IRBuilder, out: Any, x: Any, count: Any, factor: Any, scale: Any) -> None:
    scales, factors = splat(builder, scale), splat(builder, factor)
    with loop(builder, builder.sdiv(count, I64(LANES)), []) as (index, _, _):
        where = builder.mul(index, I64(LANES * FLOAT_BYTES))
        added = builder.fmul(load(builder, x, VF, where), scales)
        store(builder, multiply_add(builder, load(builder, out, VF, where), factors, added), out, where)


def _scale(builder: ir.IRBuilder, out: Any, x: Any, count: Any, scale: Any) -> None:
    scales = splat(builder, scale)
    with loop(builder, builder.sdiv(count, I64(LANES)), []) as (index, _, _):
        where = builder.mul(index, I64(LANES * FLOAT_BYTES))
        store(builder, builder.fmul(load(builder, x, VF, where), scales), out, where)


def _clear(builder: ir.IRBuilder, out: Any, count: Any) -> None:
    with loop(builder, builder.sdiv(count, I64(LANES)), []) as (index, _, _):
        store(builder, constant(0.0), out, builder.mul(index, I64(LANES * FLOAT_BYTES)))


# (out, count): out = 0 over `count` floats, a multiple of 16.
clear = addressed(2, types.void, _clear)
# (out, x, count, factor, scale): out = factor x out + scale x x over `count` floats, a multiple of 16.
blend = addressed(3, types.void, _blend, floats=2)
# (out, x, count, scale): out = scale x x.
scale_into = addressed(3, types.void, _scale, floats=1)
