"""Steps of `kvcache.gptq.gptq_codes` in vector IR: the 32 tokens of a page are the lanes, channels come one after the other.

A row is one channel's 32 float32 numbers. Products and differences are not fused, so that codes equal the reference's bit for
bit.
"""

from typing import Any

from llvmlite import ir
from numba import types

from elastickv.backends.cpu.intrinsics import (
    F32,
    FLOAT_BYTES,
    I16,
    I32,
    I64,
    addressed,
    constant,
    load,
    loop,
    splat,
    store,
    widen_bf16,
)
from elastickv.backends.cpu.quantize_vectors import MAGIC, UNIT, ExactPlane, chunk
from elastickv.recipe import PAGE_TOKENS

ROW_BYTES = PAGE_TOKENS * FLOAT_BYTES
ROW, SHORTS = ir.VectorType(F32, PAGE_TOKENS), ir.VectorType(I16, PAGE_TOKENS)


def _keys_row(builder: ir.IRBuilder, code: Any, source: Any, dim: Any, channel: Any, target: Any, zero: Any) -> None:
    plane = ExactPlane(builder, code, source, dim, False)
    for first in range(0, PAGE_TOKENS, UNIT):
        numbers = builder.fsub(plane.unit(channel, I64(first)), splat(builder, zero, UNIT))
        store(builder, numbers, target, FLOAT_BYTES * first)


def _values_rows(builder: ir.IRBuilder, code: Any, source: Any, dim: Any, target: Any) -> None:
    plane = ExactPlane(builder, code, source, dim, True)
    with loop(builder, builder.sdiv(dim, I64(UNIT)), []) as (unit, _, _):
        channel = builder.mul(unit, I64(UNIT))
        with loop(builder, I64(PAGE_TOKENS), []) as (token, _, _):
            numbers = plane.unit(token, channel)
            for number in range(UNIT):
                store(builder, builder.extract_element(numbers, I32(number)), target, _place(builder, channel, number, token))


def _values_plane(builder: ir.IRBuilder, source: Any, dim: Any, target: Any) -> None:
    numbers = ir.VectorType(F32, UNIT)
    with loop(builder, builder.sdiv(dim, I64(UNIT)), []) as (unit, _, _):
        channel = builder.mul(unit, I64(UNIT))
        start, columns = chunk(builder, dim, channel)
        first = builder.add(builder.mul(start, I64(PAGE_TOKENS)), builder.sub(channel, start))
        with loop(builder, I64(PAGE_TOKENS), []) as (token, _, _):
            row = ir.Constant(numbers, ir.Undefined)
            for number in range(UNIT):
                one = load(builder, source, F32, _place(builder, channel, number, token))
                row = builder.insert_element(row, one, I32(number))
            store(builder, row, target, builder.mul(builder.add(first, builder.mul(token, columns)), I64(FLOAT_BYTES)))


def _place(builder: ir.IRBuilder, channel: Any, number: int, token: Any) -> Any:
    """Return the bytes from the first row to a token of row `channel` + `number`."""
    row = builder.mul(builder.add(channel, I64(number)), I64(PAGE_TOKENS))
    return builder.mul(builder.add(row, token), I64(FLOAT_BYTES))


def _subtract_zeros(builder: ir.IRBuilder, row: Any, zeros: Any) -> None:
    store(builder, builder.fsub(load(builder, row, ROW), widen_bf16(builder, load(builder, zeros, SHORTS))), row)


def _subtract_errors(builder: ir.IRBuilder, row: Any, errors: Any, shares: Any, count: Any) -> None:
    with loop(builder, count, [load(builder, row, ROW)]) as (index, rest, final):
        share = splat(builder, load(builder, shares, F32, builder.mul(index, I64(FLOAT_BYTES))), PAGE_TOKENS)
        error = load(builder, errors, ROW, builder.mul(index, I64(ROW_BYTES)))
        rest[0] = builder.fsub(rest[0], builder.fmul(error, share))
    store(builder, final[0], row)


def _round_row(builder: ir.IRBuilder, row: Any, error: Any, scale: Any, low: Any, high: Any) -> None:
    x, most, least = load(builder, row, ROW), splat(builder, high, PAGE_TOKENS), splat(builder, low, PAGE_TOKENS)
    position = builder.fdiv(x, scale)
    position = builder.select(builder.fcmp_ordered("<", most, position), most, position)
    position = builder.select(builder.fcmp_ordered(">", position, least), position, least)
    magic, zero = constant(MAGIC, PAGE_TOKENS), constant(0.0, PAGE_TOKENS)
    whole = builder.fsub(builder.fadd(position, magic), magic)
    code = builder.select(builder.fcmp_ordered(">", scale, zero), whole, zero)
    store(builder, builder.fsub(x, builder.fmul(code, scale)), error)
    store(builder, code, row)


def _round_keys(builder: ir.IRBuilder, row: Any, error: Any, scale: Any, low: Any, high: Any) -> None:
    _round_row(builder, row, error, splat(builder, scale, PAGE_TOKENS), low, high)


def _round_by_token(builder: ir.IRBuilder, row: Any, error: Any, scales: Any, low: Any, high: Any) -> None:
    _round_row(builder, row, error, widen_bf16(builder, load(builder, scales, SHORTS)), low, high)


# (exact format, plane of K, head_dim, channel, row, zero): a channel minus its zero.
keys_row = addressed(5, types.void, _keys_row, floats=1)
# (exact format, plane of V, head_dim, rows): the rows of all channels.
values_rows = addressed(4, types.void, _values_rows)
# (rows, head_dim, plane of V): the opposite, to a plane of float32.
values_plane = addressed(3, types.void, _values_plane)
# (row, zeros): minus 32 bfloat16 zeros.
subtract_zeros = addressed(2, types.void, _subtract_zeros)
# (row, rows of errors, shares, count): minus the first `count` >= 1 errors times their shares, in this order.
subtract_errors = addressed(4, types.void, _subtract_errors)
# (row, row of errors, scale, least code, greatest code): the row becomes its codes; what they leave over goes to the errors.
round_keys = addressed(2, types.void, _round_keys, floats=3)
# (row, row of errors, 32 bfloat16 scales, least code, greatest code): likewise.
round_by_token = addressed(3, types.void, _round_by_token, floats=2)
