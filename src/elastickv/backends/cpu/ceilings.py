"""The measured limits of the host: what an attention kernel is held against."""

from time import perf_counter

import numpy as np
from numba import cfunc

from elastickv.backends.cpu import threads
from elastickv.backends.cpu.intrinsics import store_f32, words
from elastickv.backends.cpu.vector import copy_stream, multiply_add_stream, read_stream, read_stream_ahead
from elastickv.backends.protocol import Ceilings, DeviceInfo

MIN_BUFFER_BYTES, MAX_BUFFER_BYTES = 64 << 20, 1 << 30
CACHES_EXCEEDED = 8
PIECE_BYTES = 1 << 16
AHEAD_BYTES = (0, 1024, 4096)  # prefetch distances; 0 leaves it to the processor
ROUNDS = 5
MULTIPLY_TURNS = 200_000
FLOPS_PER_TURN = 16 * 16 * 2


@cfunc("void(int64, int64)", cache=True, error_model="numpy")
def _read(arguments, thread):  # type: ignore[no-untyped-def]
    a = words(arguments)
    source, piece, ahead, sums = a[0], a[1], a[2], a[3]
    if ahead:
        store_f32(sums + 64 * thread, read_stream_ahead(source + thread * piece, piece, ahead))
    else:
        store_f32(sums + 64 * thread, read_stream(source + thread * piece, piece, ahead))


@cfunc("void(int64, int64)", cache=True, error_model="numpy")
def _copy(arguments, thread):  # type: ignore[no-untyped-def]
    a = words(arguments)
    source, target, piece = a[0], a[1], a[2]
    copy_stream(target + thread * piece, source + thread * piece, piece)


@cfunc("void(int64, int64)", cache=True, error_model="numpy")
def _multiply_add(arguments, thread):  # type: ignore[no-untyped-def]
    a = words(arguments)
    store_f32(a[1] + 64 * thread, multiply_add_stream(thread, a[0]))


def measure(device: DeviceInfo) -> Ceilings:
    """Measure the fastest of several read streams, a copy and multiply-adds in registers, on all threads."""
    count = device.compute_units
    wanted = max(MIN_BUFFER_BYTES, CACHES_EXCEEDED * device.last_level_cache_bytes)
    size = min(wanted, MAX_BUFFER_BYTES, device.free_bytes // 4)
    piece = size // count // PIECE_BYTES * PIECE_BYTES
    buffer = np.ones(piece * count // 4, np.float32)  # touched, or every page would be the same zeros
    sums = np.zeros(16 * count, np.float32)
    half = piece // 2 // PIECE_BYTES * PIECE_BYTES
    middle = buffer.ctypes.data + half * count
    multiply = threads.Launch(_multiply_add, count, [MULTIPLY_TURNS, sums.ctypes.data])
    copy = threads.Launch(_copy, count, [buffer.ctypes.data, middle, half])
    reads = [threads.Launch(_read, count, [buffer.ctypes.data, piece, ahead, sums.ctypes.data]) for ahead in AHEAD_BYTES]
    return Ceilings(
        read_gbs=piece * count / min(_seconds(read) for read in reads) / 1e9,
        copy_gbs=2 * half * count / _seconds(copy) / 1e9,
        flops=count * MULTIPLY_TURNS * FLOPS_PER_TURN / _seconds(multiply),
    )


def _seconds(launch: threads.Launch) -> float:
    """Return the least time of some rounds: anything else that runs can only slow a stream down."""
    times = []
    for _ in range(ROUNDS):
        start = perf_counter()
        launch()
        times.append(perf_counter() - start)
    return min(times)
