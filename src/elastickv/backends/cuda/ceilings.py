"""Measures the device's limits: the best of several read kernels, a copy, multiply-adds."""

from collections.abc import Callable
from functools import partial

from elastickv.backends.cuda import launch
from elastickv.backends.cuda.device import CudaDevice, check
from elastickv.backends.cuda.kernel_selection import ceilings_variant
from elastickv.backends.protocol import Ceilings

_MOST_BYTES = 2 << 30
_REPEATS = 7
_UNROLLS = (2, 4, 8)
_BLOCKS = (1, 2, 4, 8, 16)


def measure(device: CudaDevice) -> Ceilings:
    """Return the ceilings of `device`."""
    n_bytes = min(_MOST_BYTES, device.free_bytes // 3) // (1 << 20) * (1 << 20)
    source, target = device.allocate(n_bytes, 0x3F8CCCCD), device.allocate(n_bytes, 0)
    sink, vectors = device.allocate(16, 0), n_bytes // 16
    read_ms, copy_ms = float("inf"), float("inf")
    for unroll in _UNROLLS:
        variant = ceilings_variant(device.arch, unroll)
        for per_unit in _BLOCKS:
            blocks = device.multiprocessors * per_unit
            for kernel in (launch.read, launch.read_chunks):
                read = partial(kernel, device, variant, blocks, source=source, vectors=vectors, sink=sink)
                read_ms = min(read_ms, _median_ms(device, read))
            copy = partial(launch.copy, device, variant, blocks, source=source, target=target, vectors=vectors)
            copy_ms = min(copy_ms, _median_ms(device, copy))
    return Ceilings(n_bytes / read_ms / 1e6, 2 * n_bytes / copy_ms / 1e6, _flops(device))


def _flops(device: CudaDevice) -> float:
    """Return float32-accumulating operations per second: tensor cores on 16-bit operands where attention uses them."""
    variant = ceilings_variant(device.arch)
    blocks = device.multiprocessors * 4
    sink = device.allocate(16, 0)
    ms = _median_ms(device, partial(launch.multiply_add, device, variant, blocks, sink=sink))
    rounds = 4096
    if variant["TENSOR"]:
        operations = blocks * (variant.threads // 32) * rounds * 8 * (2 * 16 * 8 * 16)
    else:
        operations = blocks * variant.threads * rounds * 16 * 2
    return operations / ms * 1e3


def _median_ms(device: CudaDevice, queue: Callable[[], None]) -> float:
    driver, stream = device.driver, device.stream
    events = [check(driver.cuEventCreate(0)) for _ in range(_REPEATS + 1)]
    queue()
    check(driver.cuEventRecord(events[0], stream.handle))
    for event in events[1:]:
        queue()
        check(driver.cuEventRecord(event, stream.handle))
    stream.sync()
    elapsed = getattr(driver, "cuEventElapsedTime_v2", driver.cuEventElapsedTime)
    times = sorted(float(check(elapsed(a, b))) for a, b in zip(events, events[1:], strict=False))
    for event in events:
        driver.cuEventDestroy(event)
    return times[len(times) // 2]
