"""The measured limits of the host: what an attention kernel is held against."""

from time import perf_counter

import numpy as np
from numba import cfunc
from numpy.typing import NDArray

from elastickv.backends.cpu import threads
from elastickv.backends.cpu.intrinsics import atomic_add, store_f32, words
from elastickv.backends.cpu.streams import (
    copy_stream,
    multiply_add_stream,
    read_4_streams,
    read_8_streams,
    read_stream,
    read_stream_ahead,
)
from elastickv.backends.protocol import Ceilings, DeviceInfo

MIN_BUFFER_BYTES, MAX_BUFFER_BYTES = 64 << 20, 1 << 30
CACHES_EXCEEDED = 8
PIECE_BYTES = 1 << 20
FOUR_STREAMS, EIGHT_STREAMS = -4, -8
# How a piece is read: prefetched this many bytes ahead; 0 leaves it to the processor; or in several streams.
READ_WAYS = (0, 512, 4096, FOUR_STREAMS, EIGHT_STREAMS)
WAYS_KEPT = 2
# Rounds of a stream, of which the fastest counts: two at least, then more until so much time is spent. Where a cache is of
# hundreds of megabytes a round reads a gigabyte, and a run measures six times.
LEAST_ROUNDS, MOST_ROUNDS = 2, 8
ENOUGH_S = 0.1
MULTIPLY_TURNS = 200_000
FLOPS_PER_TURN = 16 * 16 * 2


@cfunc("void(int64, int64)", cache=True, error_model="numpy")
def _read(arguments, thread):  # type: ignore[no-untyped-def]
    """Read `pieces` pieces, taken by ticket as attention's work items are: a thread that is held up must not set the limit."""
    a = words(arguments)
    ticket, pieces, source, ahead, sums = a[0], a[1], a[2], a[3], a[4]
    piece = atomic_add(ticket, 1)
    while piece < pieces:
        if ahead == EIGHT_STREAMS:
            store_f32(sums + 64 * thread, read_8_streams(source + piece * PIECE_BYTES, PIECE_BYTES))
        elif ahead == FOUR_STREAMS:
            store_f32(sums + 64 * thread, read_4_streams(source + piece * PIECE_BYTES, PIECE_BYTES))
        elif ahead:
            store_f32(sums + 64 * thread, read_stream_ahead(source + piece * PIECE_BYTES, PIECE_BYTES, ahead))
        else:
            store_f32(sums + 64 * thread, read_stream(source + piece * PIECE_BYTES, PIECE_BYTES, ahead))
        piece = atomic_add(ticket, 1)


@cfunc("void(int64, int64)", cache=True, error_model="numpy")
def _copy(arguments, thread):  # type: ignore[no-untyped-def]
    """Copy `pieces` pieces, taken by ticket."""
    a = words(arguments)
    ticket, pieces, source, target = a[0], a[1], a[2], a[3]
    piece = atomic_add(ticket, 1)
    while piece < pieces:
        copy_stream(target + piece * PIECE_BYTES, source + piece * PIECE_BYTES, PIECE_BYTES)
        piece = atomic_add(ticket, 1)


@cfunc("void(int64, int64)", cache=True, error_model="numpy")
def _multiply_add(arguments, thread):  # type: ignore[no-untyped-def]
    a = words(arguments)
    store_f32(a[1] + 64 * thread, multiply_add_stream(thread, a[0]))


class Limits:
    """Measures the host; after the first time it reads in those ways only that were the fastest then."""

    def __init__(self) -> None:
        self._ways: tuple[int, ...] = READ_WAYS

    def measure(self, device: DeviceInfo) -> Ceilings:
        """Measure the fastest of several read streams, a copy and multiply-adds in registers, on all threads."""
        found, seconds = _measured(device, self._ways)
        self._ways = tuple(sorted(seconds, key=lambda way: seconds[way])[:WAYS_KEPT])
        return found


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
    found = Ceilings(
        read_gbs=pieces * PIECE_BYTES / min(seconds.values()) / 1e9,
        copy_gbs=pieces * PIECE_BYTES / _seconds(copy, ticket) / 1e9,
        flops=count * MULTIPLY_TURNS * FLOPS_PER_TURN / _seconds(multiply, ticket),
    )
    return found, seconds


def _seconds(launch: threads.Launch, ticket: NDArray[np.int64]) -> float:
    """Return the least time of some rounds: anything else that runs can only slow a stream down."""
    times: list[float] = []
    while len(times) < LEAST_ROUNDS or (len(times) < MOST_ROUNDS and sum(times) < ENOUGH_S):
        ticket[:] = 0
        start = perf_counter()
        launch()
        times.append(perf_counter() - start)
    return min(times)
