"""Folds scales into multipliers of codes: queries (K with scales of channels) and probabilities (V in int8 and fewer bits).

q . (scale x code + zero) = (q x scale) . code + q . zero, and sum of p x (scale x code + zero) = sum of (p x scale) x code
+ sum of p x zero: no code is ever multiplied by its scale. The folded numbers become 16-bit integers with one unit each. For
int8 per channel they stay floats: there 16 bits would not do for channels of a small range beside one with a thousand times as
much, as a key's bias in a fast rotary channel has.
"""

from typing import Any

from llvmlite import ir
from numba import types

from elastickv.backends.cpu.intrinsics import (
    F32,
    FLOAT_BYTES,
    HALVES,
    I16,
    I64,
    LANES,
    VF,
    VI,
    addressed,
    by_width,
    call,
    constant,
    larger,
    load,
    load_bf16,
    loop,
    multiply_add,
    prefetch,
    reduce,
    splat,
    store,
    widen_fp16,
)

INT16_MAX = 32767.0
HALF_LANES = ir.VectorType(I16, LANES)
MAGIC = 12582912.0  # 1.5 x 2^23: the sum ends in the whole number, rounded half to even


def _lift(builder: ir.IRBuilder, peak: Any) -> Any:
    """Return the power of two to multiply by before `_inverse` of a peak so small that it would overflow; else 1."""
    return builder.select(builder.fcmp_ordered("<", peak, F32(2.0**-100)), F32(2.0**40), F32(1.0))


def _inverse(builder: ir.IRBuilder, peak: Any) -> Any:
    """Return 32767 / peak; 0 for a peak so small that its inverse would overflow."""
    safe = builder.fcmp_ordered(">", peak, F32(2.0**-110))
    return builder.select(safe, builder.fdiv(F32(INT16_MAX), builder.select(safe, peak, F32(1.0))), F32(0.0))


def _store_whole(builder: ir.IRBuilder, shifted: Any, address: Any, offset: Any) -> None:
    store(builder, builder.trunc(builder.bitcast(shifted, VI), HALF_LANES), address, offset)


def halves(builder: ir.IRBuilder, address: Any, offset: Any) -> Any:
    """Load 16 halves as float32."""
    return widen_fp16(builder, load(builder, address, HALF_LANES, offset))


def _fold(builder: ir.IRBuilder, code: int, width: int, args: tuple[Any, ...]) -> None:
    bounds, dim, queries, query_bytes, narrow, narrow_bytes, units, biases, prefetch_bytes = args
    turns, zeros = builder.sdiv(dim, I64(LANES)), builder.mul(dim, I64(2))
    none = constant(0.0)
    with loop(builder, turns, [none] * (2 * width)) as (index, carried, final):
        where = builder.mul(index, I64(2 * LANES))
        prefetch(
            builder, bounds, builder.add(prefetch_bytes, builder.mul(where, I64(2)))
        )  # scales and zeros: twice as many bytes
        scale = halves(builder, bounds, where)
        zero = halves(builder, bounds, builder.add(where, zeros))
        for query in range(width):
            at = builder.add(builder.mul(index, I64(FLOAT_BYTES * LANES)), builder.mul(query_bytes, I64(query)))
            q = load(builder, queries, VF, at)
            size = call(builder, f"llvm.fabs.v{LANES}f32", VF, builder.fmul(q, scale))
            carried[query] = multiply_add(builder, q, zero, carried[query])
            carried[width + query] = larger(builder, size, carried[width + query])
    inverses = []
    for query in range(width):
        bias = reduce(builder, final[query], builder.fadd)
        peak = reduce(builder, final[width + query], lambda a, b: larger(builder, a, b))
        store(builder, bias, biases, query * FLOAT_BYTES)
        store(builder, builder.fmul(peak, F32(1 / INT16_MAX)), units, query * FLOAT_BYTES)
        # Bounds of keys are halves: the scores of a query with such a peak are zero in float32.
        inverses.append(splat(builder, _inverse(builder, peak)))
    with loop(builder, turns, []) as (index, _, _):
        where = builder.mul(index, I64(2 * LANES))
        scale = halves(builder, bounds, where)
        for query in range(width):
            at = builder.add(builder.mul(index, I64(FLOAT_BYTES * LANES)), builder.mul(query_bytes, I64(query)))
            scaled = builder.fmul(load(builder, queries, VF, at), inverses[query])
            shifted = multiply_add(builder, scaled, scale, constant(MAGIC))
            _store_whole(builder, shifted, narrow, builder.add(where, builder.mul(narrow_bytes, I64(query))))


def _fold_floats(builder: ir.IRBuilder, code: int, width: int, args: tuple[Any, ...]) -> None:
    bounds, dim, queries, query_bytes, folded, biases, prefetch_bytes = args
    turns, zeros = builder.sdiv(dim, I64(LANES)), builder.mul(dim, I64(2))
    with loop(builder, turns, [constant(0.0)] * width) as (index, carried, final):
        where = builder.mul(index, I64(2 * LANES))
        prefetch(builder, bounds, builder.add(prefetch_bytes, builder.mul(where, I64(2))))
        scale, zero = halves(builder, bounds, where), halves(builder, bounds, builder.add(where, zeros))
        for query in range(width):
            at = builder.add(builder.mul(index, I64(FLOAT_BYTES * LANES)), builder.mul(query_bytes, I64(query)))
            q = load(builder, queries, VF, at)
            carried[query] = multiply_add(builder, q, zero, carried[query])
            store(builder, builder.fmul(q, scale), folded, at)
    for query in range(width):
        store(builder, reduce(builder, final[query], builder.fadd), biases, query * FLOAT_BYTES)


# (0, width, bounds, head_dim, queries, their bytes, folded queries, biases, prefetch_bytes): the same in float32.
fold_page_floats = addressed(9, types.void, by_width([0], _fold_floats))


# (0, width, bounds, head_dim, queries, query_bytes, int16 queries, their bytes, units, biases, prefetch_bytes): folds one
# page's scales into its queries; a NaN or infinity among them reaches the scores through the bias.
fold_page = addressed(11, types.void, by_width([0], _fold))


def _to_integers(builder: ir.IRBuilder, queries: Any, dim: Any, narrow: Any, unit: Any) -> None:
    turns, none = builder.sdiv(dim, I64(LANES)), constant(0.0)
    with loop(builder, turns, [none, none]) as (index, carried, final):
        q = load(builder, queries, VF, builder.mul(index, I64(FLOAT_BYTES * LANES)))
        carried[0] = larger(builder, call(builder, f"llvm.fabs.v{LANES}f32", VF, q), carried[0])
        carried[1] = builder.fadd(q, carried[1])
    peak = reduce(builder, final[0], lambda a, b: larger(builder, a, b))
    total = reduce(builder, final[1], builder.fadd)
    # A NaN or infinity in the query reaches the scores through the unit.
    store(builder, builder.fadd(builder.fmul(peak, F32(1 / INT16_MAX)), builder.fmul(total, F32(0.0))), unit)
    lift = _lift(builder, peak)
    lifts, inverse = splat(builder, lift), splat(builder, _inverse(builder, builder.fmul(peak, lift)))
    with loop(builder, turns, []) as (index, _, _):
        q = load(builder, queries, VF, builder.mul(index, I64(FLOAT_BYTES * LANES)))
        shifted = multiply_add(builder, builder.fmul(q, lifts), inverse, constant(MAGIC))
        _store_whole(builder, shifted, narrow, builder.mul(index, I64(2 * LANES)))


# (query, head_dim, int16 query, its unit).
to_integers = addressed(4, types.void, _to_integers)


def _weigh(builder: ir.IRBuilder, zeros: bool, args: tuple[Any, ...]) -> None:
    probabilities, scales, weights, unit, factor, zero_sums = args
    folded, zero_sum = [], None
    if zeros:
        rescale = splat(builder, load(builder, factor, F32))
        zero_sum = builder.fmul(load(builder, zero_sums, VF), rescale)
    for half in range(HALVES):
        p = load(builder, probabilities, VF, half * LANES * FLOAT_BYTES)
        used = builder.fcmp_unordered("!=", p, constant(0.0))  # beyond a short page there may be any bits
        folded.append(builder.select(used, builder.fmul(p, load_bf16(builder, scales, half)), constant(0.0)))
        if zeros:
            zero_sum = multiply_add(builder, p, load_bf16(builder, scales, HALVES + half), zero_sum)
    if zeros:
        store(builder, zero_sum, zero_sums)
    peak = reduce(builder, larger(builder, *folded), lambda a, b: larger(builder, a, b))
    store(builder, builder.fmul(peak, F32(1 / INT16_MAX)), unit)
    lift = _lift(builder, peak)
    lifts, inverse = splat(builder, lift), splat(builder, _inverse(builder, builder.fmul(peak, lift)))
    for half, weight in enumerate(folded):
        shifted = multiply_add(builder, builder.fmul(weight, lifts), inverse, constant(MAGIC))
        _store_whole(builder, shifted, weights, half * LANES * 2)


# (probabilities, the tokens' bf16 scales, int16 weights, their unit).
weigh = addressed(4, types.void, lambda builder, *args: _weigh(builder, False, (*args, None, None)))
# The same with 32 zeros behind the 32 scales: zero_sums = factor x zero_sums + p x zero, 16 lanes to be added up at the end.
weigh_with_zeros = addressed(6, types.void, lambda builder, *args: _weigh(builder, True, args))


def _total(builder: ir.IRBuilder, address: Any) -> Any:
    return reduce(builder, load(builder, address, VF), builder.fadd)


# (address): the sum of 16 floats.
total_of = addressed(1, types.float32, _total)
