"""What a driver or PyTorch raises becomes an error that says what is gone, and what to do."""

import sys
from enum import IntEnum
from types import SimpleNamespace

import pytest

from elastickv.backends.driver_errors import LOST, device_failures, failure, recognized
from elastickv.errors import DeviceFailure, DeviceLost, KernelMismatch, RanOut, UsageError

OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})
AcceleratorError = type("AcceleratorError", (RuntimeError,), {"__module__": "torch"})
CUDAError = type("CUDAError", (Exception,), {"__module__": "cuda.core._utils.cuda_utils"})


class Status(IntEnum):
    """A few of the driver's."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_LAUNCH_FAILED = 719


@pytest.mark.fault("lost device")
@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (CUDAError("CUDA_ERROR_ILLEGAL_ADDRESS: while executing a kernel"), DeviceLost, "context is gone"),
        (CUDAError("CUDA_ERROR_LAUNCH_FAILED: a device exception"), DeviceLost, "new process"),
        (AcceleratorError("CUDA error: an illegal memory access was encountered"), DeviceLost, "context is gone"),
        (AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors"), DeviceLost, "context is gone"),
        (AcceleratorError("CUDA error: invalid configuration argument"), DeviceFailure, "invalid configuration"),
        (CUDAError("CUDA_ERROR_INVALID_CONTEXT: no context"), DeviceFailure, "thread has no CUDA context"),
        (CUDAError("CUDA_ERROR_NOT_INITIALIZED: cuInit"), DeviceFailure, "forked process"),
        (CUDAError("CUDA_ERROR_NOT_SUPPORTED: never"), DeviceFailure, "CUDA_ERROR_NOT_SUPPORTED"),
    ],
)
def test_a_drivers_error_says_what_is_gone_and_what_to_do(raised, kind, said):
    with pytest.raises(kind, match=said) as error, device_failures():
        raise raised
    assert type(error.value) is kind and error.value.__cause__ is raised
    assert "\n" not in str(error.value)


@pytest.mark.fault("out of memory")
@pytest.mark.parametrize(
    "raised", [CUDAError("CUDA_ERROR_OUT_OF_MEMORY: no"), OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_want_of_memory_is_no_other_failure(raised):
    assert isinstance(recognized(raised), RanOut)
    assert "`context`" in str(recognized(raised))


@pytest.mark.parametrize(
    "raised", [ValueError("CUDA"), UsageError("CUDA_ERROR_OUT_OF_MEMORY"), KernelMismatch("x"), OSError(28, "")]
)
def test_everything_else_stays_what_it_is(raised):
    assert recognized(raised) is None
    with pytest.raises(type(raised)) as error, device_failures():
        raise raised
    assert error.value is raised


@pytest.mark.fault("lost device")
def test_every_status_after_which_a_context_is_dead_is_a_lost_device():
    driver = pytest.importorskip("cuda.bindings.driver")
    for code, name in LOST.items():
        assert getattr(driver.CUresult, name, code) == code
        assert isinstance(failure(code, name), DeviceLost)


@pytest.mark.fault("out of memory")
def test_the_drivers_status_is_raised_by_its_meaning():
    pytest.importorskip("cuda.bindings")
    from elastickv.backends.cuda.device import DriverAllocator, check

    assert check((Status.CUDA_SUCCESS, 5)) == 5
    full = SimpleNamespace(cuMemAlloc=lambda n: (Status.CUDA_ERROR_OUT_OF_MEMORY, 0))
    with pytest.raises(RanOut, match="CUDA_ERROR_OUT_OF_MEMORY"):
        DriverAllocator(full).allocate(1 << 40)
    with pytest.raises(DeviceLost, match="CUDA_ERROR_LAUNCH_FAILED"):
        check((Status.CUDA_ERROR_LAUNCH_FAILED,))
    with pytest.raises(DeviceFailure, match="CUDA_ERROR_INVALID_VALUE"):
        check((Status.CUDA_ERROR_INVALID_VALUE,))


@pytest.mark.gpu
@pytest.mark.fault("out of memory")
def test_a_full_device_says_so_and_works_on(open_cuda):
    device = open_cuda()._device
    with pytest.raises(RanOut, match="CUDA_ERROR_OUT_OF_MEMORY"):
        device.allocate(1 << 46)
    assert device.download(device.allocate(64, 7), (16,), "int32").tolist() == [7] * 16


_LOSES = """
import ctypes
from elastickv.backends import load
from elastickv.backends.driver_errors import device_failures
from elastickv.errors import DeviceLost
device = load("cuda")[0]._device
try:
    with device_failures():
        source = b'extern "C" __global__ void trap() { asm("trap;"); }'
        from cuda.bindings import nvrtc
        _, program = nvrtc.nvrtcCreateProgram(source, b"trap.cu", 0, [], [])
        nvrtc.nvrtcCompileProgram(program, 1, [f"--gpu-architecture=sm_{device.arch}".encode()])
        cubin = bytes(nvrtc.nvrtcGetCUBINSize(program)[1])
        nvrtc.nvrtcGetCUBIN(program, cubin)
        from cuda.core import LaunchConfig, ObjectCode, launch
        launch(device.stream, LaunchConfig(grid=1, block=1), ObjectCode.from_cubin(cubin).get_kernel("trap"))
        device.stream.sync()
except DeviceLost as error:
    print(error)
"""


@pytest.mark.gpu
@pytest.mark.fault("lost device")
def test_a_kernel_that_traps_loses_the_device_of_its_process_alone(open_cuda):
    import subprocess

    open_cuda()
    done = subprocess.run([sys.executable, "-c", _LOSES], capture_output=True, text=True, timeout=120, check=False)
    assert "context is gone" in done.stdout, done.stderr
    assert open_cuda()._device.download(open_cuda()._device.allocate(64, 7), (16,), "int32").tolist() == [7] * 16
