"""The CPU backend: decode attention in Numba. Kernels are compiled on first use and stored on disk."""

from typing import TYPE_CHECKING

from elastickv.errors import UsageError

if TYPE_CHECKING:
    from elastickv.backends.cpu.backend import CpuBackend
    from elastickv.backends.protocol import Reporter

__all__ = ["open_backend"]


def open_backend(device: int | None, report: "Reporter | None" = None) -> "CpuBackend":
    """Return the CPU backend. It compiles its kernels when it makes its first cache, and tells `report` how far it is.

    Raises
    ------
    UsageError : if the device number is not 0, or Numba cannot run with its environment variables.
    """
    if device not in (None, 0):
        raise UsageError(f"device {device} does not exist: the cpu backend has one device, 0")
    from elastickv.backends.cpu.settings import check_settings

    check_settings()
    from elastickv.backends.cpu.numba_cache import cache_kernels_on_disk

    with cache_kernels_on_disk():
        from elastickv.backends.cpu.backend import CpuBackend
    return CpuBackend(report)
