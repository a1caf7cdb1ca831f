"""One CUDA device: its properties, stream, memory and loaded kernels."""

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from elastickv.backends.cuda.compiler import nvrtc_version, supported_architectures
from elastickv.backends.cuda.kernel_selection import Variant
from elastickv.backends.cuda.wheels import cuda_install_command
from elastickv.backends.driver_errors import failure
from elastickv.backends.protocol import Allocator, DeviceInfo
from elastickv.backends.protocol import DeviceMemory as DeviceMemory
from elastickv.errors import UsageError

_OLDEST = 61


def check(result: tuple[Any, ...]) -> Any:
    """Return the values that a driver call returned with its status.

    Raises
    ------
    RanOut : if memory ran out.
    DeviceLost : if the context was lost.
    DeviceFailure : if the call failed otherwise.
    """
    status, *values = result
    if int(status):
        raise failure(int(status), getattr(status, "name", f"CUDA error {int(status)}"))
    return values[0] if len(values) == 1 else tuple(values)


def driver_api() -> Any:
    """Return `cuda.bindings.driver`, initialized.

    Raises
    ------
    UsageError : if a package, the driver or a device is missing.
    """
    try:
        import cuda.core  # noqa: F401
        from cuda.bindings import driver
    except ImportError as error:
        raise UsageError(f"the CUDA backend is not installed: {cuda_install_command()}") from error
    try:
        check(driver.cuInit(0))
        count = check(driver.cuDeviceGetCount())
    except Exception as error:  # without a driver the bindings raise types of their own
        raise UsageError(f"no CUDA device can be used ({error}): install an NVIDIA driver, or use `backend=cpu`") from error
    if not count:
        raise UsageError("no CUDA device is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES, or use `backend=cpu`")
    return driver


class _DriverMemory:
    def __init__(self, driver: Any, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self.pointer = int(check(driver.cuMemAlloc(n_bytes)))
        weakref.finalize(self, driver.cuMemFree, self.pointer)  # also at exit, while the driver's functions are still there


class DriverAllocator:
    """The driver's own allocator."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def allocate(self, n_bytes: int) -> DeviceMemory:
        """Allocate."""
        return _DriverMemory(self._driver, n_bytes)

    def free_bytes(self) -> int:
        """Return the bytes that the driver has left."""
        return int(check(self._driver.cuMemGetInfo())[0])


class BorrowedStream:
    """A stream owned by the caller, by its handle."""

    def __init__(self, driver: Any, handle: int) -> None:
        self._driver, self.number = driver, handle
        self.handle = driver.CUstream(handle)

    def sync(self) -> None:
        """Wait for all queued work."""
        check(self._driver.cuStreamSynchronize(self.handle))


_FULL_SHARED_MEMORY = frozenset({"append", "select", "decode_pages", "store_blocks", "select_blocks", "decode_blocks"})
OVERLAPPING = frozenset({"append", "append_rows", "select", "decode", "store_blocks", "select_blocks", "decode_blocks"})
_OVERLAPS_SINCE = 90
_SMALL_BYTES, _MOST_SENT = 1 << 16, 256
Argument: TypeAlias = ctypes.c_void_p | ctypes.c_int | ctypes.c_longlong | ctypes.c_ulonglong | ctypes.c_float


@cache
def _loaded_on(ordinal: int) -> dict[tuple[Variant, str], Any]:
    """Return the kernels loaded on a device; all users of a device share its primary context."""
    return {}


class CudaDevice:
    """A device with its primary context current and one stream that everything runs on: its own, or one that it follows.

    Its memory comes from `allocator`; the default is the driver.
    """

    def __init__(self, ordinal: int | None, allocator: Allocator | None = None) -> None:
        self.driver = driver_api()
        from cuda.core import Device

        count = check(self.driver.cuDeviceGetCount())
        self.ordinal = ordinal or 0
        if not 0 <= self.ordinal < count:
            raise UsageError(f"CUDA device {ordinal} does not exist: choose 0 to {count - 1}")
        self._handle = check(self.driver.cuDeviceGet(self.ordinal))
        self.arch = self._choose_arch()
        self.core = Device(self.ordinal)
        self.core.set_current()
        self._own_stream = self.core.create_stream()
        self.stream: Any = self._own_stream
        self.allocator = allocator or DriverAllocator(self.driver)
        self.multiprocessors = self._attribute("MULTIPROCESSOR_COUNT")
        self._kernels = _loaded_on(self.ordinal)
        self._sent: list[tuple[Any, NDArray[Any]]] = []
        self._in_order = False

    def follow(self, stream: int) -> None:
        """Queue on the stream with this handle from now on."""
        if getattr(self.stream, "number", None) != stream:
            self.stream = BorrowedStream(self.driver, stream)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Let each kernel that is launched meanwhile start when the one before it has ended."""
        self._in_order = True
        try:
            yield
        finally:
            self._in_order = False

    def _attribute(self, name: str) -> int:
        which = getattr(self.driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(check(self.driver.cuDeviceGetAttribute(which, self._handle)))

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability, (9, 0)."""
        return self._attribute("COMPUTE_CAPABILITY_MAJOR"), self._attribute("COMPUTE_CAPABILITY_MINOR")

    def _choose_arch(self) -> str:
        major, minor = self.capability
        if major * 10 + minor < _OLDEST:
            raise UsageError(f"compute capability {major}.{minor} is too old: 6.1 (Pascal) is the least; use `backend=cpu`")
        compiler = nvrtc_version()
        version = int(check(self.driver.cuDriverGetVersion()))
        if version // 1000 < compiler[0]:
            raise UsageError(
                f"the driver is too old: it runs CUDA {version // 1000}.{version % 1000 // 10}, NVRTC is {compiler[0]}."
                f'{compiler[1]}; update the driver, or pip install "elastickv[cuda]" for CUDA 12'
            )
        fits = [a for a in supported_architectures() if a // 10 == major and a % 10 <= minor]
        if not fits:
            raise UsageError(
                f"NVRTC {compiler[0]}.{compiler[1]} does not compile for compute capability {major}.{minor}: "
                f'pip install "elastickv[{"cuda" if major < 8 else "cuda13"}]"'
            )
        return str(max(fits))

    def info(self) -> DeviceInfo:
        """Return the device's description for results."""
        total = check(self.driver.cuMemGetInfo())[1]
        name = check(self.driver.cuDeviceGetName(128, self._handle))
        major, minor = self.capability
        return DeviceInfo(
            kind="cuda",
            name=name.split(b"\0")[0].decode() if isinstance(name, bytes) else str(name),
            sm=f"{major}.{minor}",
            compute_units=self.multiprocessors,
            theoretical_bw_gbs=self._theoretical_gbs(),
            last_level_cache_bytes=self._attribute("L2_CACHE_SIZE"),
            memory_bytes=int(total),
            free_bytes=self.free_bytes,
            driver=self._driver_version(),
        )

    def _theoretical_gbs(self) -> float | None:
        width = self._attribute("GLOBAL_MEMORY_BUS_WIDTH")
        try:
            clock_khz = self._attribute("MEMORY_CLOCK_RATE")
        except (AttributeError, RuntimeError):
            clock_khz = 0
        if not clock_khz:
            clock_khz = 1000 * (self._from_nvml("memory clock") or 0)
        return clock_khz * 1e3 * 2 * width / 8 / 1e9 if clock_khz and width else None

    def _driver_version(self) -> str:
        version = self._from_nvml("driver")
        runs = int(check(self.driver.cuDriverGetVersion()))
        return str(version) if version else f"CUDA {runs // 1000}.{runs % 1000 // 10}"

    def _from_nvml(self, what: str) -> Any:
        """Return a value from NVML, or None if it is not available."""
        try:
            import pynvml

            pynvml.nvmlInit()
            if what == "driver":
                version = pynvml.nvmlSystemGetDriverVersion()
                return version.decode() if isinstance(version, bytes) else version
            bus = check(self.driver.cuDeviceGetPCIBusId(32, self._handle)).split(b"\0")[0]
            return pynvml.nvmlDeviceGetMaxClockInfo(pynvml.nvmlDeviceGetHandleByPciBusId(bus), pynvml.NVML_CLOCK_MEM)
        except Exception:  # absent, unsupported or not permitted
            return None

    @property
    def free_bytes(self) -> int:
        """Device memory that can still be allocated."""
        return self.allocator.free_bytes()

    def allocate(self, n_bytes: int, fill: int | None = None) -> DeviceMemory:
        """Allocate device memory; `fill` is a 32-bit word to fill it with."""
        memory = self.allocator.allocate(max(n_bytes, 16))
        if fill is not None:
            self.fill(memory, fill)
        return memory

    def fill(self, memory: DeviceMemory, word: int) -> None:
        """Fill memory with a 32-bit word."""
        check(self.driver.cuMemsetD32Async(memory.pointer, word, memory.n_bytes // 4, self.stream.handle))

    def kernel(self, variant: Variant, name: str) -> Any:
        """Return a kernel loaded on this device."""
        from cuda.core import ObjectCode

        key = (variant, name)
        if key not in self._kernels:
            code = ObjectCode.from_cubin(variant.compiled().cubin)
            kernel = code.get_kernel(name)
            if variant.shared_bytes and name in ("decode", "decode_blocks"):
                most = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                check(self.driver.cuKernelSetAttribute(most, variant.shared_bytes, kernel.handle, self._handle))
            if variant.source in _FULL_SHARED_MEMORY and "K_FORMAT" in dict(variant.macros):
                # A multiprocessor stalls to repartition its memory between kernels with different carveouts.
                carveout = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
                check(self.driver.cuKernelSetAttribute(carveout, 100, kernel.handle, self._handle))
            self._kernels[key] = kernel
        return self._kernels[key]

    def blocks_per_multiprocessor(self, variant: Variant, name: str) -> int:
        """Return how many blocks of a kernel fit a multiprocessor at once."""
        occupancy = self.kernel(variant, name).occupancy
        return max(1, int(occupancy.max_active_blocks_per_multiprocessor(variant.threads, variant.shared_bytes)))

    def clusters_at_once(self, variant: Variant, name: str, blocks: int) -> int:
        """Return how many clusters of `blocks` blocks the device runs at once; clusters do not span its GPCs."""
        from cuda.core import LaunchConfig

        config = LaunchConfig(grid=1, cluster=blocks, block=variant.threads)
        return int(self.kernel(variant, name).occupancy.max_active_clusters(config, stream=self._own_stream))

    def launch(self, variant: Variant, name: str, grid: tuple[int, ...], arguments: Sequence[Argument]) -> None:
        """Launch a kernel on the stream; the functions of `launch` give it typed arguments.

        From SM 9.0 on, kernels of `OVERLAPPING` may start while the previous one still runs, but for those that are launched
        `in_order`: they wait for it themselves.
        """
        driver = self.driver
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*(int(n) for n in grid), 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = variant.threads, 1, 1
        config.sharedMemBytes = variant.shared_bytes
        config.hStream = self.stream.handle
        if name in OVERLAPPING and not self._in_order and int(variant.arch) >= _OVERLAPS_SINCE:
            early = driver.CUlaunchAttribute()
            early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            early.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [early], 1
        function = driver.CUfunction(int(self.kernel(variant, name).handle))
        check(driver.cuLaunchKernelEx(config, function, ctypes.addressof(addresses), 0))

    def upload(self, memory: DeviceMemory, array: NDArray[Any], offset: int = 0) -> None:
        """Queue a copy of a host array to the device; wait for it if it is large."""
        host = np.array(array, order="C") if array.nbytes <= _SMALL_BYTES else np.ascontiguousarray(array)
        if not host.nbytes:
            return
        check(self.driver.cuMemcpyHtoDAsync(memory.pointer + offset, host.ctypes.data, host.nbytes, self.stream.handle))
        # A GPU that reads pageable memory directly needs the array until the copy has run.
        self._sent.append((self.stream, host))
        if host.nbytes > _SMALL_BYTES or len(self._sent) > _MOST_SENT:
            for stream in {id(stream): stream for stream, _ in self._sent}.values():
                stream.sync()
            self._sent.clear()

    def download(self, memory: DeviceMemory, shape: tuple[int, ...], dtype: Any, offset: int = 0) -> NDArray[Any]:
        """Copy from the device to a new host array."""
        host = np.empty(shape, dtype)
        if host.nbytes:
            check(self.driver.cuMemcpyDtoHAsync(host.ctypes.data, memory.pointer + offset, host.nbytes, self.stream.handle))
        self.stream.sync()
        return host

    def copy(self, target: DeviceMemory, source: DeviceMemory, n_bytes: int) -> None:
        """Copy on the device."""
        if n_bytes:
            check(self.driver.cuMemcpyDtoDAsync(target.pointer, source.pointer, n_bytes, self.stream.handle))
