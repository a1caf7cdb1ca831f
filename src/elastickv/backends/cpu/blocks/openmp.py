"""The OpenMP runtime of the process, if it has one. Nothing is imported for it."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class OpenMP:
    """Functions of libgomp, which libiomp5 has, too.

    Attributes
    ----------
    parallel : `GOMP_parallel`(function, data, threads, flags) calls function(data) on that many threads.
    most_threads : `omp_get_max_threads`(), of the calling thread.
    """

    parallel: Callable[[int, int, int, int], None]
    most_threads: Callable[[], int]


@cache
def loaded_openmp() -> OpenMP | None:
    """Return the runtime that the process has loaded for all its libraries; None if there is none."""
    try:
        process = ctypes.CDLL(None)
        parallel, most_threads = process.GOMP_parallel, process.omp_get_max_threads
    except (AttributeError, OSError, TypeError):  # no such runtime, or Windows, where a process is no library
        return None
    parallel.argtypes, parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return OpenMP(parallel, most_threads)
