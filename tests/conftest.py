"""The CUDA tests that need a device are marked `gpu` and skipped only where no device can be opened."""

import pytest


@pytest.fixture(scope="session")
def open_cuda():
    """Return a function that opens the back end with forced kernels; skips where there is no device."""
    from elastickv.backends.cuda.device import driver_api
    from elastickv.errors import UsageError

    try:
        driver_api()
    except UsageError as reason:
        pytest.skip(str(reason))
    from elastickv.backends.cuda.backend import CudaBackend

    opened = {}

    def open_(kind="auto", **macros):
        key = (kind, tuple(sorted(macros.items())))
        if key not in opened:
            opened[key] = CudaBackend(None, kind, macros)
        return opened[key]

    return open_
