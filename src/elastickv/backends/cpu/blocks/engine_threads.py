"""Parallel regions on the threads that an engine already has.

An engine's process has an OpenMP runtime, whose threads it may have bound to processors, one each. Threads of Numba's own would
share those processors with them. Where the main thread is bound, Numba knows of one processor only, and tells OpenMP so when it
starts its threads, for the engine's operators as well: it must not start them there.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from elastickv.backends.cpu import threads
from elastickv.backends.cpu.blocks.host_blocks import address
from elastickv.backends.cpu.blocks.openmp import loaded_openmp
from elastickv.backends.cpu.intrinsics import atomic_add, invoke_2, words
from elastickv.backends.cpu.numba_cache import Kernel, kernel


def count() -> int:
    """Return how many threads a region has: those of OpenMP, as the engine set them, or Numba's."""
    openmp = loaded_openmp()
    return threads.count() if openmp is None else max(1, int(openmp.most_threads()))


@kernel("void(int64)")
def enter(region):  # type: ignore[no-untyped-def]
    """Call a region's function with its arguments and the next thread number."""
    r = words(region)
    invoke_2(r[0], r[1], atomic_add(region + 16, 1))


class Region:
    """A prepared call of a kernel of (address of arguments, thread number) by one thread or by several.

    Parameters
    ----------
    function : the kernel.
    number : threads, at most `count()`.
    arguments : words, shared with the caller.
    """

    def __init__(self, function: Kernel, number: int, arguments: NDArray[np.int64]) -> None:
        self._alone = threads.Launch(function, 1, arguments)
        self._words = np.array([function.address, address(arguments), 0], np.int64)
        self._call = (enter.address, address(self._words), number, 0)
        openmp = loaded_openmp()
        if number == 1:
            self._together: Callable[[], None] = self._alone
        elif openmp is None:
            self._together = threads.Launch(function, number, arguments)
        else:
            self._parallel, self._together = openmp.parallel, self._on_openmp

    def __call__(self, several: bool) -> None:
        (self._together if several else self._alone)()

    def _on_openmp(self) -> None:
        self._words[2] = 0
        self._parallel(*self._call)
