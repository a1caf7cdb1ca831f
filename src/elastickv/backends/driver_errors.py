"""Translates errors of the driver or of PyTorch into errors of ElasticKV that say what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from elastickv.errors import DeviceFailure, DeviceLost, KernelMismatch, NonFiniteError, RanOut, UsageError

OUT_OF_MEMORY, NOT_INITIALIZED, NO_CONTEXT = 2, 3, 201
# After one of these every further call on the context fails: CUresult in the manual of the driver API.
LOST: dict[int, str] = {
    46: "CUDA_ERROR_DEVICE_UNAVAILABLE",
    214: "CUDA_ERROR_ECC_UNCORRECTABLE",
    220: "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    226: "CUDA_ERROR_CONTAINED",
    700: "CUDA_ERROR_ILLEGAL_ADDRESS",
    702: "CUDA_ERROR_LAUNCH_TIMEOUT",
    709: "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    710: "CUDA_ERROR_ASSERT",
    714: "CUDA_ERROR_HARDWARE_STACK_ERROR",
    715: "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    716: "CUDA_ERROR_MISALIGNED_ADDRESS",
    717: "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    718: "CUDA_ERROR_INVALID_PC",
    719: "CUDA_ERROR_LAUNCH_FAILED",
    999: "CUDA_ERROR_UNKNOWN",
}
_NAMES = {name: code for code, name in LOST.items()} | {
    "CUDA_ERROR_OUT_OF_MEMORY": OUT_OF_MEMORY,
    "CUDA_ERROR_NOT_INITIALIZED": NOT_INITIALIZED,
    "CUDA_ERROR_INVALID_CONTEXT": NO_CONTEXT,
}
# Texts of the CUDA runtime, and so of PyTorch, which do not name the error.
_TEXTS = {
    "CUDA out of memory": OUT_OF_MEMORY,
    "CUDA error: out of memory": OUT_OF_MEMORY,
    "illegal memory access": 700,
    "unspecified launch failure": 719,
    "device-side assert": 710,
    "misaligned address": 716,
    "uncorrectable ECC": 214,
}
_OURS = (UsageError, KernelMismatch, NonFiniteError, DeviceFailure)


def failure(code: int, said: str) -> Exception:
    """Return the error that stands for a status of the CUDA driver.

    Parameters
    ----------
    code : the driver's number (CUresult).
    said : text of the driver or library, for the message.
    """
    if code == OUT_OF_MEMORY:
        return RanOut(
            f"the device's memory ran out ({said}): give a shorter `context`, a smaller `batch` or fewer heads, "
            "or end what else uses the device"
        )
    if code in LOST:
        return DeviceLost(
            f"the device's context is gone ({said}), and all that this process had on the device with it: run again in a new "
            "process; if it happens again, nvidia-smi and dmesg (Xid) tell more"
        )
    if code == NOT_INITIALIZED:
        return DeviceFailure(f"the CUDA driver is not initialized here ({said}): a forked process can't use CUDA, spawn one")
    if code == NO_CONTEXT:
        return DeviceFailure(
            f"this thread has no CUDA context ({said}): use a backend in the thread that opened it, or begin the thread with "
            "cuda.core.Device(number).set_current()"
        )
    return DeviceFailure(f"the CUDA driver failed ({said}): nvidia-smi tells whether the device still works")


def recognized(error: Exception) -> Exception | None:
    """Return the error of ElasticKV for one of a driver or PyTorch; None if it is neither, or already one of ElasticKV."""
    if isinstance(error, _OURS):
        return None
    said = " ".join(f"{type(error).__name__}: {error}".split())
    name = re.search(r"CUDA_ERROR_[A-Z_]+", said)
    if name:
        return failure(_NAMES.get(name[0], -1), name[0])
    code = next((code for text, code in _TEXTS.items() if text in said), None)
    if code is None and type(error).__module__.split(".")[0] == "torch" and "CUDA error" in said:
        code = -1
    return None if code is None else failure(code, said[:200])


@contextmanager
def device_failures() -> Iterator[None]:
    """Turn errors that a driver or PyTorch raises inside into `RanOut`, `DeviceLost` or `DeviceFailure`."""
    try:
        yield
    except Exception as error:
        known = recognized(error)
        if known is None:
            raise
        raise known from error
