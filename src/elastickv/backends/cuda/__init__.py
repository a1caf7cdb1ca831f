"""The CUDA backend: CUDA C++ compiled at run time, for Pascal (6.1) to Blackwell (12.0)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elastickv.backends.protocol import Allocator, Backend


def open_backend(device: int | None, allocator: "Allocator | None" = None) -> "Backend":
    """Return the backend for a CUDA device; None is the first. Its memory comes from `allocator`, by default the driver.

    Raises
    ------
    UsageError : if a package, the driver, the device or a compiler for it is missing; the message says what to do.
    """
    from elastickv.backends.cuda.backend import CudaBackend

    return CudaBackend(device, allocator=allocator)
