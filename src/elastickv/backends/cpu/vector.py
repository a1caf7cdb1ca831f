"""The two vector kernels that a page of 32 tokens goes through, for up to 4 query heads at a time.

`multiply_page` is sum over rows of coefficient x row: scores when rows are the elements of K (stored transposed, so that
32 tokens fill vector registers and nothing is reduced across lanes), and weighted values when rows are tokens.
`softmax_page` is one step of the online softmax (Milakov and Gimelshein 2018).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types

from elastickv.backends.cpu.intrinsics import (
    BF16,
    COLUMNS,
    F32,
    FP16,
    FP32,
    I8,
    I16,
    I32,
    I64,
    INT8,
    LANES,
    VF,
    VI,
    WIDTHS,
    addressed,
    constant,
    exp2,
    larger,
    load,
    multiply_add,
    prefetch,
    reduce,
    splat,
    store,
    widen_bf16,
    widen_fp16,
)

FLOAT_BYTES = 4
ELEMENT_BYTES = {FP32: 4, FP16: 2, BF16: 2, INT8: 1}
INT16_MAX = 32767.0
HALVES = COLUMNS // LANES


def _row(builder: ir.IRBuilder, fmt: int, row: Any) -> list[Any]:
    """Load one row of 32 columns as two operands of 16; for int8, a pair of rows, interleaved."""
    if fmt == FP32:
        return [load(builder, row, VF, half * LANES * 4) for half in range(HALVES)]
    if fmt == INT8:
        narrow, wide = ir.VectorType(I8, 2 * LANES), ir.VectorType(I16, 2 * LANES)
        return [builder.sext(load(builder, row, narrow, half * 2 * LANES), wide) for half in range(HALVES)]
    widen = widen_bf16 if fmt == BF16 else widen_fp16
    bits = ir.VectorType(I16, LANES)
    return [widen(builder, load(builder, row, bits, half * LANES * 2)) for half in range(HALVES)]


def _multiply_pairs(builder: ir.IRBuilder, a: Any, b: Any, total: Any) -> Any:
    """Return total + a[2i] * b[2i] + a[2i+1] * b[2i+1] in int32: PMADDWD, or VPDPWSSD where there is one."""
    wide = ir.VectorType(I32, 2 * LANES)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    even, odd = (
        builder.shuffle_vector(product, product, ir.Constant(VI, list(range(first, 2 * LANES, 2)))) for first in (0, 1)
    )
    return builder.add(total, builder.add(even, odd))


@contextmanager
def _rows(builder: ir.IRBuilder, count: Any, starts: list[Any]) -> Iterator[tuple[Any, list[Any], list[Any]]]:
    """Loop `count` >= 1 times with values carried in registers; the body must replace the items of the second list."""
    before, body, after = builder.block, builder.append_basic_block("rows"), builder.append_basic_block("rows.end")
    builder.branch(body)
    builder.position_at_end(body)
    index = builder.phi(I64)
    index.add_incoming(I64(0), before)
    carried = [builder.phi(start.type) for start in starts]
    for phi, start in zip(carried, starts, strict=True):
        phi.add_incoming(start, before)
    results = list(carried)
    final: list[Any] = []
    yield index, results, final
    following = builder.add(index, I64(1))
    index.add_incoming(following, builder.block)
    for phi, result in zip(carried, results, strict=True):
        phi.add_incoming(result, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), body, after)
    builder.position_at_end(after)
    final.extend(results)


def _multiply(builder: ir.IRBuilder, fmt: int, width: int, accumulate: bool, args: tuple[Any, ...]) -> None:
    base, row_bytes, count, coefficients, query_bytes, out, out_bytes, scales, factors, ahead = args
    zero = ir.Constant(VI if fmt == INT8 else VF, [0] * LANES)
    with _rows(builder, count, [zero] * (HALVES * width)) as (index, sums, final):
        row = builder.add(base, builder.mul(index, row_bytes))
        operands = _row(builder, fmt, row)
        for line in range(2 if fmt == FP32 else 1):
            prefetch(builder, row, builder.add(ahead, I64(64 * line)))
        step = builder.mul(index, I64(FLOAT_BYTES))
        for query in range(width):
            where = builder.add(step, builder.mul(query_bytes, I64(query)))
            if fmt == INT8:
                pair = builder.bitcast(splat(builder, load(builder, coefficients, I32, where)), ir.VectorType(I16, 2 * LANES))
            else:
                pair = splat(builder, load(builder, coefficients, F32, where))
            for half in range(HALVES):
                i = query * HALVES + half
                if fmt == INT8:
                    sums[i] = _multiply_pairs(builder, operands[half], pair, sums[i])
                else:
                    sums[i] = multiply_add(builder, operands[half], pair, sums[i])
    for query in range(width):
        scale = splat(builder, load(builder, scales, F32, query * FLOAT_BYTES)) if fmt == INT8 else None
        factor = splat(builder, load(builder, factors, F32, query * FLOAT_BYTES)) if accumulate else None
        for half in range(HALVES):
            value = final[query * HALVES + half]
            if scale is not None:
                value = builder.fmul(builder.sitofp(value, VF), scale)
            where = builder.add(builder.mul(out_bytes, I64(query)), I64(half * LANES * FLOAT_BYTES))
            if factor is not None:
                value = multiply_add(builder, load(builder, out, VF, where), factor, value)
            store(builder, value, out, where)


def _multiply_any(accumulate: bool) -> Any:
    def body(builder: ir.IRBuilder, fmt: Any, width: Any, *args: Any) -> None:
        end = builder.append_basic_block("page.end")
        choice = builder.add(builder.mul(fmt, I64(8)), width)
        switch = builder.switch(choice, end)
        for code in ELEMENT_BYTES:
            for queries in WIDTHS:
                block = builder.append_basic_block(f"page.{code}.{queries}")
                switch.add_case(I64(code * 8 + queries), block)
                builder.position_at_end(block)
                _multiply(builder, code, queries, accumulate, args)
                builder.branch(end)
        builder.position_at_end(end)

    return body


# (format, width, base, row_bytes, rows, coefficients, query_bytes, out, out_bytes, scales, factors, ahead): addresses and
# byte counts; out[query] = scale x sum, or factor x out[query] + scale x sum; `ahead` bytes further on is prefetched.
multiply_page = addressed(12, types.void, _multiply_any(False))
accumulate_page = addressed(12, types.void, _multiply_any(True))


def _softmax(builder: ir.IRBuilder, quantised: bool, args: tuple[Any, ...]) -> None:
    scores, valid, state, factor, token_scales, weights, weight_scale = args
    lanes = [ir.Constant(VI, list(range(h * LANES, (h + 1) * LANES))) for h in range(HALVES)]
    limit = splat(builder, builder.trunc(valid, I32))
    values = []
    for half, lane in enumerate(lanes):
        value = load(builder, scores, VF, half * LANES * FLOAT_BYTES)
        if quantised:
            value = builder.fmul(value, _scales(builder, token_scales, half))
        values.append(builder.select(builder.icmp_signed("<", lane, limit), value, constant(float("-inf"))))
    old_top, old_total = load(builder, state, F32), load(builder, state, F32, FLOAT_BYTES)
    top = reduce(builder, larger(builder, *values), lambda a, b: larger(builder, a, b))
    top = larger(builder, old_top, top)
    tops = splat(builder, top)
    rescale = builder.extract_element(exp2(builder, splat(builder, builder.fsub(old_top, top))), I32(0))
    exps = [exp2(builder, builder.fsub(value, tops)) for value in values]
    total = reduce(builder, builder.fadd(*exps), builder.fadd)
    store(builder, top, state)
    store(builder, builder.fadd(builder.fmul(old_total, rescale), total), state, FLOAT_BYTES)
    store(builder, rescale, factor)
    if not quantised:
        for half, weight in enumerate(exps):
            store(builder, weight, weights, half * LANES * FLOAT_BYTES)
        return
    exps = [
        builder.select(
            builder.icmp_signed("<", lanes[half], limit),
            builder.fmul(weight, _scales(builder, token_scales, HALVES + half)),
            constant(0.0),
        )
        for half, weight in enumerate(exps)
    ]
    peak = reduce(builder, larger(builder, *exps), lambda a, b: larger(builder, a, b))
    store(builder, builder.fmul(peak, F32(1 / INT16_MAX)), weight_scale)
    # A peak this small weighs nothing in float32; its inverse would overflow.
    safe = builder.fcmp_ordered(">", peak, F32(2.0**-110))
    inverse = builder.select(safe, builder.fdiv(F32(INT16_MAX), builder.select(safe, peak, F32(1.0))), F32(0.0))
    magic = constant(12582912.0)
    for half, weight in enumerate(exps):
        shifted = builder.fadd(builder.fmul(weight, splat(builder, inverse)), magic)
        whole = builder.trunc(builder.bitcast(shifted, VI), ir.VectorType(I16, LANES))
        store(builder, whole, weights, half * LANES * 2)


def _scales(builder: ir.IRBuilder, address: Any, half: int) -> Any:
    return widen_bf16(builder, load(builder, address, ir.VectorType(I16, LANES), half * LANES * 2))


# (scores, valid tokens, state: running maximum and sum, factor on what was accumulated before, weights): float32.
softmax_page = addressed(5, types.void, lambda builder, *args: _softmax(builder, False, (*args[:4], None, args[4], None)))
# The same for int8 rows: their bf16 scales, K's 32 then V's 32, go into scores and weights; weights leave as int16.
softmax_page_int8 = addressed(7, types.void, lambda builder, *args: _softmax(builder, True, args))


def _blend(builder: ir.IRBuilder, out: Any, x: Any, count: Any, factor: Any, scale: Any) -> None:
    scales, factors = splat(builder, scale), splat(builder, factor)
    with _rows(builder, builder.sdiv(count, I64(LANES)), []) as (index, _, _):
        where = builder.mul(index, I64(LANES * FLOAT_BYTES))
        added = builder.fmul(load(builder, x, VF, where), scales)
        store(builder, multiply_add(builder, load(builder, out, VF, where), factors, added), out, where)


def _scale(builder: ir.IRBuilder, out: Any, x: Any, count: Any, scale: Any) -> None:
    scales = splat(builder, scale)
    with _rows(builder, builder.sdiv(count, I64(LANES)), []) as (index, _, _):
        where = builder.mul(index, I64(LANES * FLOAT_BYTES))
        store(builder, builder.fmul(load(builder, x, VF, where), scales), out, where)


# (out, x, count, factor, scale): out = factor x out + scale x x over `count` floats, a multiple of 16.
blend = addressed(3, types.void, _blend, floats=2)
# (out, x, count, scale): out = scale x x.
scale_into = addressed(3, types.void, _scale, floats=1)


def _read_stream(prefetches: bool) -> Any:
    def body(builder: ir.IRBuilder, base: Any, n_bytes: Any, ahead: Any) -> Any:
        turn = 8 * LANES * FLOAT_BYTES
        with _rows(builder, builder.sdiv(n_bytes, I64(turn)), [constant(0.0)] * 8) as (index, sums, final):
            row = builder.add(base, builder.mul(index, I64(turn)))
            for i in range(8):
                if prefetches:
                    prefetch(builder, row, builder.add(ahead, I64(64 * i)))
                sums[i] = builder.fadd(sums[i], load(builder, row, VF, 64 * i))
        return _total(builder, final)

    return body


def _read_streams(count: int) -> Any:
    """Read `count` equal parts of a buffer side by side: each is a stream of its own to the processor's prefetcher."""

    def body(builder: ir.IRBuilder, base: Any, n_bytes: Any) -> Any:
        loads = 8 // count
        part = builder.sdiv(n_bytes, I64(count))
        bases = [builder.add(base, builder.mul(part, I64(i))) for i in range(count)]
        turn = loads * LANES * FLOAT_BYTES
        with _rows(builder, builder.sdiv(part, I64(turn)), [constant(0.0)] * 8) as (index, sums, final):
            where = builder.mul(index, I64(turn))
            for i in range(8):
                row = builder.add(bases[i // loads], where)
                sums[i] = builder.fadd(sums[i], load(builder, row, VF, 64 * (i % loads)))
        return _total(builder, final)

    return body


def _copy_stream(builder: ir.IRBuilder, target: Any, source: Any, n_bytes: Any) -> None:
    """Copy a buffer, 256 bytes a turn."""
    turn = 4 * LANES * FLOAT_BYTES
    with _rows(builder, builder.sdiv(n_bytes, I64(turn)), []) as (index, _, _):
        where = builder.mul(index, I64(turn))
        for i in range(4):
            store(builder, load(builder, builder.add(source, where), VF, 64 * i), builder.add(target, where), 64 * i)


def _total(builder: ir.IRBuilder, sums: list[Any]) -> Any:
    total = sums[0]
    for other in sums[1:]:
        total = builder.fadd(total, other)
    return reduce(builder, total, builder.fadd)


def _peak(builder: ir.IRBuilder, seed: Any, turns: Any) -> Any:
    """Run `turns` x 16 independent multiply-adds of 16 lanes."""
    start = splat(builder, builder.sitofp(seed, F32))
    starts = [builder.fadd(start, constant(float(i))) for i in range(16)]
    with _rows(builder, turns, starts) as (_, sums, final):
        for i in range(16):
            sums[i] = multiply_add(builder, sums[i], constant(0.999), start)
    return _total(builder, final)


# (address, bytes, ahead): add up a buffer in 8 independent sums, 512 bytes a turn; prefetching `ahead` bytes further on.
read_stream = addressed(3, types.float32, _read_stream(False))
read_stream_ahead = addressed(3, types.float32, _read_stream(True))
# (address, bytes): the same in 4 or 8 streams.
read_8_streams = addressed(2, types.float32, _read_streams(8))
read_4_streams = addressed(2, types.float32, _read_streams(4))
copy_stream = addressed(3, types.void, _copy_stream)
multiply_add_stream = addressed(2, types.float32, _peak)
