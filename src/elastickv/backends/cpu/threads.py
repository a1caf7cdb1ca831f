"""The one parallel region: every thread calls a compiled function with a block of arguments."""

import threading
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numba import njit, prange

from elastickv.backends.cpu.intrinsics import invoke_2

# Numba's 'workqueue' layer, the only one present everywhere, aborts the process when two Python threads enter it at once.
_LOCK = threading.Lock()


def count() -> int:
    """Return the threads in use: NUMBA_NUM_THREADS, or all that the process may run on; `numba.set_num_threads` lowers it."""
    return int(numba.get_num_threads())


@njit(nogil=True, parallel=True, cache=True)
def _on_all(threads, function, arguments):  # type: ignore[no-untyped-def]
    for thread in prange(threads):
        invoke_2(function, arguments, thread)


class Launch:
    """`run` with everything prepared: a call costs little more than waking the threads."""

    def __init__(self, function: Any, threads: int, arguments: Sequence[int]) -> None:
        self._arguments = np.array(arguments, np.int64)
        self._call = (threads, function.address, self._arguments.ctypes.data)

    def __call__(self) -> None:
        with _LOCK:
            _on_all(*self._call)


def run(function: Any, threads: int, arguments: Sequence[int]) -> None:
    """Call the cfunc `function`(address of `arguments`, thread) for every thread number below `threads`."""
    Launch(function, threads, arguments)()
