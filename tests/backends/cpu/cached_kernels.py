"""A kernel of a test's own, kept on disk as the backend's are: python kept_kernels.py [compiled]; prints what it computes."""

import sys

import numpy as np
from numba import njit

from elastickv.backends.cpu import numba_cache

if len(sys.argv) > 1:
    # Whoever finds the kernel compiled has no need of a compiler.
    from numba.core import compiler

    compiler.compile_extra = None

with numba_cache.cache_kernels_on_disk():

    @njit("float64(float64[::1])", cache=True)
    def halves(values):  # type: ignore[no-untyped-def]
        total = 0.0
        for value in values:
            total += value / 2
        return total


if __name__ == "__main__":
    print(halves(np.arange(10.0)))
