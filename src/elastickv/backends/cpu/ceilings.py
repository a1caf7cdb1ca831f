"""The measured limits of the host, which attention kernels are compared with."""

from time import perf_counter
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numpy.typing import NDArray

from elastickv.backends.cpu import threads
from elastickv.backends.cpu.intrinsics import (
    F32,
    FLOAT_BYTES,
    I64,
    LANES,
    VF,
    addressed,
    atomic_add,
    constant,
    load,
    loop,
    multiply_add,
    prefetch,
    reduce,
    splat,
    store,
    store_f32,
    words,
)
from elastickv.backends.cpu.numba_cache import kernel
from elastickv.backends.protocol import Ceilings, DeviceInfo

MIN_BUFFER_BYTES, MAX_BUFFER_BYTES = 64 << 20, 1 << 30
CACHES_EXCEEDED = 8
PIECE_BYTES = 1 << 20
FOUR_STREAMS, EIGHT_STREAMS = -4, -8
# How a piece is read: with software prefetches this many bytes further on, without any (0), or in several streams.
READ_WAYS = (0, 512, 4096, FOUR_STREAMS, EIGHT_STREAMS)
FASTEST_WAYS = 2
# Rounds of a stream, of which the fastest counts: at least two, then more until ENOUGH_S is spent. With a last-level cache of
# hundreds of megabytes a round reads a gigabyte, and a run measures six times.
LEAST_ROUNDS, MOST_ROUNDS = 2, 8
ENOUGH_S = 0.1
MULTIPLY_TURNS = 200_000
FLOPS_PER_TURN = 16 * 16 * 2


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


@kernel("void(int64, int64)")
def _read(arguments, thread):  # type: ignore[no-untyped-def]
    """Read `pieces` pieces by ticket, as attention takes its work items, so that a delayed thread does not set the limit."""
    a = words(arguments)
    ticket, pieces, source, way, sums = a[0], a[1], a[2], a[3], a[4]
    piece = atomic_add(ticket, 1)
    while piece < pieces:
        if way == EIGHT_STREAMS:
            store_f32(sums + 64 * thread, read_8_streams(source + piece * PIECE_BYTES, PIECE_BYTES))
        elif way == FOUR_STREAMS:
            store_f32(sums + 64 * thread, read_4_streams(source + piece * PIECE_BYTES, PIECE_BYTES))
        elif way:
            store_f32(sums + 64 * thread, read_stream_prefetched(source + piece * PIECE_BYTES, PIECE_BYTES, way))
        else:
            store_f32(sums + 64 * thread, read_stream(source + piece * PIECE_BYTES, PIECE_BYTES, way))
        piece = atomic_add(ticket, 1)


@kernel("void(int64, int64)")
def _copy(arguments, thread):  # type: ignore[no-untyped-def]
    """Copy `pieces` pieces, taken by ticket."""
    a = words(arguments)
    ticket, pieces, source, target = a[0], a[1], a[2], a[3]
    piece = atomic_add(ticket, 1)
    while piece < pieces:
        copy_stream(target + piece * PIECE_BYTES, source + piece * PIECE_BYTES, PIECE_BYTES)
        piece = atomic_add(ticket, 1)


@kernel("void(int64, int64)")
def _multiply_add(arguments, thread):  # type: ignore[no-untyped-def]
    a = words(arguments)
    store_f32(a[1] + 64 * thread, multiply_add_stream(thread, a[0]))


class Limits:
    """Measures the host. Later measurements use only the ways to read that were the fastest in the first one."""

    def __init__(self) -> None:
        self._ways: tuple[int, ...] = READ_WAYS

    def measure(self, device: DeviceInfo) -> Ceilings:
        """Measure the fastest of several read streams, a copy and multiply-adds in registers, on all threads."""
        ceilings, seconds = _measured(device, self._ways)
        self._ways = tuple(sorted(seconds, key=lambda way: seconds[way])[:FASTEST_WAYS])
        return ceilings


def _measured(device: DeviceInfo, ways: tuple[int, ...]) -> tuple[Ceilings, dict[int, float]]:
    """Return the limits, and the seconds of each way to read."""
    count = device.compute_units
    wanted = max(MIN_BUFFER_BYTES, CACHES_EXCEEDED * device.last_level_cache_bytes)
    size = min(wanted, MAX_BUFFER_BYTES, device.free_bytes // 4)
    pieces = size // PIECE_BYTES // 2 * 2
    buffer = np.ones(pieces * PIECE_BYTES // 4, np.float32)  # touched, or every page would be the same zeros
    ticket, sums = np.zeros(8, np.int64), np.zeros(16 * count, np.float32)
    start, half = buffer.ctypes.data, pieces // 2
    multiply = threads.Launch(_multiply_add, count, [MULTIPLY_TURNS, sums.ctypes.data])
    copy = threads.Launch(_copy, count, [ticket.ctypes.data, half, start, start + half * PIECE_BYTES])
    reads = {way: threads.Launch(_read, count, [ticket.ctypes.data, pieces, start, way, sums.ctypes.data]) for way in ways}
    seconds = {way: _seconds(read, ticket) for way, read in reads.items()}
    ceilings = Ceilings(
        read_gbs=pieces * PIECE_BYTES / min(seconds.values()) / 1e9,
        copy_gbs=pieces * PIECE_BYTES / _seconds(copy, ticket) / 1e9,
        flops=count * MULTIPLY_TURNS * FLOPS_PER_TURN / _seconds(multiply, ticket),
    )
    return ceilings, seconds


def _seconds(launch: threads.Launch, ticket: NDArray[np.int64]) -> float:
    """Return the shortest time of some rounds: other load can only slow a stream down."""
    times: list[float] = []
    while len(times) < LEAST_ROUNDS or (len(times) < MOST_ROUNDS and sum(times) < ENOUGH_S):
        ticket[:] = 0
        start = perf_counter()
        launch()
        times.append(perf_counter() - start)
    return min(times)
