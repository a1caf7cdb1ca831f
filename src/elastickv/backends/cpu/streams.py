"""The loops of the measured limits: they read, copy and multiply as fast as the host can."""

from typing import Any

from llvmlite import ir
from numba import types

from elastickv.backends.cpu.intrinsics import (
    F32,
    FLOAT_BYTES,
    I64,
    LANES,
    VF,
    addressed,
    constant,
    load,
    loop,
    multiply_add,
    prefetch,
    reduce,
    splat,
    store,
)


def _read_stream(prefetches: bool) -> Any:
    def body(builder: ir.IRBuilder, base: Any, n_bytes: Any, prefetch_bytes: Any) -> Any:
        turn = 8 * LANES * FLOAT_BYTES
        with loop(builder, builder.sdiv(n_bytes, I64(turn)), [constant(0.0)] * 8) as (index, sums, final):
            row = builder.add(base, builder.mul(index, I64(turn)))
            for i in range(8):
                if prefetches:
                    prefetch(builder, row, builder.add(prefetch_bytes, I64(64 * i)))
                sums[i] = builder.fadd(sums[i], load(builder, row, VF, 64 * i))
        return _total(builder, final)

    return body


def _read_streams(count: int) -> Any:
    """Read `count` equal parts of a buffer in turn: the processor's prefetcher sees each as a separate stream."""

    def body(builder: ir.IRBuilder, base: Any, n_bytes: Any) -> Any:
        loads = 8 // count
        part = builder.sdiv(n_bytes, I64(count))
        bases = [builder.add(base, builder.mul(part, I64(i))) for i in range(count)]
        turn = loads * LANES * FLOAT_BYTES
        with loop(builder, builder.sdiv(part, I64(turn)), [constant(0.0)] * 8) as (index, sums, final):
            where = builder.mul(index, I64(turn))
            for i in range(8):
                row = builder.add(bases[i // loads], where)
                sums[i] = builder.fadd(sums[i], load(builder, row, VF, 64 * (i % loads)))
        return _total(builder, final)

    return body


def _copy_stream(builder: ir.IRBuilder, target: Any, source: Any, n_bytes: Any) -> None:
    """Copy a buffer, 256 bytes a turn."""
    turn = 4 * LANES * FLOAT_BYTES
    with loop(builder, builder.sdiv(n_bytes, I64(turn)), []) as (index, _, _):
        where = builder.mul(index, I64(turn))
        for i in range(4):
            store(builder, load(builder, builder.add(source, where), VF, 64 * i), builder.add(target, where), 64 * i)


def _total(builder: ir.IRBuilder, sums: list[Any]) -> Any:
    total = sums[0]
    for other in sums[1:]:
        total = builder.fadd(total, other)
    return reduce(builder, total, builder.fadd)


def _peak(builder: ir.IRBuilder, seed: Any, turns: Any) -> Any:
    """Run `turns` x 16 independent multiply-adds of 16 lanes. The addend is 1 or more, because denormal sums would be slow."""
    start = builder.fadd(splat(builder, builder.sitofp(seed, F32)), constant(1.0))
    starts = [builder.fadd(start, constant(float(i))) for i in range(16)]
    with loop(builder, turns, starts) as (_, sums, final):
        for i in range(16):
            sums[i] = multiply_add(builder, sums[i], constant(0.999), start)
    return _total(builder, final)


# (address, bytes, prefetch_bytes): add up a buffer in 8 independent sums, 512 bytes a turn, prefetching so far ahead.
read_stream = addressed(3, types.float32, _read_stream(False))
read_stream_prefetched = addressed(3, types.float32, _read_stream(True))
# (address, bytes): the same in 4 or 8 streams.
read_8_streams = addressed(2, types.float32, _read_streams(8))
read_4_streams = addressed(2, types.float32, _read_streams(4))
copy_stream = addressed(3, types.void, _copy_stream)
multiply_add_stream = addressed(2, types.float32, _peak)
