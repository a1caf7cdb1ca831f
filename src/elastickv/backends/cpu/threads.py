"""The only parallel region: every thread calls a compiled function with a block of arguments."""

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import numba
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from elastickv.backends.cpu.intrinsics import invoke_2

# Numba's 'workqueue' layer, the only one present everywhere, aborts the process when two Python threads enter it at once.
_LOCK = threading.Lock()
# OpenMP's threads stay behind in a fork, and entering it again aborts the child.
_FORK_UNSAFE = "omp"
_left_behind = False
MIN_PARALLEL_ELEMENTS = 1 << 17


def count() -> int:
    """Return the threads in use: NUMBA_NUM_THREADS, or all processors of the process; `numba.set_num_threads` lowers it."""
    return int(numba.get_num_threads())


def worth(elements: int, available: int) -> int:
    """Return 1 or `available` threads for `elements` of K and V: waking a second one costs up to tens of microseconds."""
    return available if elements >= MIN_PARALLEL_ELEMENTS else 1


@njit(nogil=True, cache=True)
def _on_one(function, arguments):  # type: ignore[no-untyped-def]
    invoke_2(function, arguments, 0)


@njit(nogil=True, parallel=True, cache=True)
def _on_all(threads, function, arguments):  # type: ignore[no-untyped-def]
    for thread in prange(threads):
        invoke_2(function, arguments, thread)


def _in_child() -> None:
    """Let a forked process decode: release the lock, and use one thread if the others are gone."""
    global _LOCK, _left_behind
    _LOCK = threading.Lock()
    with suppress(ValueError):  # No thread was ever started.
        _left_behind = numba.threading_layer() == _FORK_UNSAFE


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


class OneThread:
    """A context manager that raises if a second Python thread enters while one is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("two threads use one cache at once: give each a cache of its own, or let them take turns")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()


class Launch:
    """A prepared `run`: a call costs little more than waking the threads. An array of arguments is shared with the caller."""

    def __init__(self, function: Any, threads: int, arguments: Sequence[int] | NDArray[np.int64]) -> None:
        self._threads = threads
        self._arguments = np.asarray(arguments, np.int64)
        self._call = (function.address, self._arguments.ctypes.data)

    def __call__(self) -> None:
        if self._threads == 1 or _left_behind:
            _on_one(*self._call)
            return
        with _LOCK:
            _on_all(self._threads, *self._call)


def run(function: Any, threads: int, arguments: Sequence[int]) -> None:
    """Call the cfunc `function`(address of `arguments`, thread) for every thread number below `threads`."""
    Launch(function, threads, arguments)()
