"""Backends by name. A new backend is one folder and one line here."""

from importlib import import_module
from typing import Any

from elastickv.backends.driver_errors import device_failures
from elastickv.backends.gpu_detection import gpu_present
from elastickv.backends.protocol import Allocator, Backend, Reporter
from elastickv.errors import UsageError

BACKENDS: dict[str, str] = {
    "cuda": "elastickv.backends.cuda",
    "cpu": "elastickv.backends.cpu",
}


def load(
    name: str = "auto", device: int | None = None, allocator: Allocator | None = None, report: Reporter | None = None
) -> tuple[Backend, str | None]:
    """Return the backend called `name` and, for 'auto' on a machine with a GPU, why the GPU is not used.

    Parameters
    ----------
    name : 'auto' or a key of `BACKENDS`. 'auto' with a device number means 'cuda': only CUDA devices are numbered.
    device : number of the device; None is the first.
    allocator : source of device memory instead of the driver, for a backend that takes one.
    report : is told how far the CPU's kernels are compiled.

    Raises
    ------
    UsageError : if the name is unknown, or the backend cannot run here; the message says what to install.
    DeviceFailure : if the device does not work, or its kernels do not compile.
    """
    if name == "auto" and device is not None:
        name = "cuda"
    if name != "auto":
        if name not in BACKENDS:
            raise UsageError(f"backend {name!r} is unknown: choose auto, {', '.join(BACKENDS)}")
        return _open(name, device, allocator, report), None
    reason = None
    for candidate in BACKENDS:
        try:
            return _open(candidate, device if candidate == "cuda" else None, None, report), reason
        except UsageError as error:
            # Without a GPU, the absence of CUDA is no reason to report.
            reason = reason or (str(error) if candidate != "cuda" or gpu_present() else None)
    raise UsageError(reason or "no backend can run here")


def _open(name: str, device: int | None, allocator: Allocator | None, report: Reporter | None) -> Backend:
    options: dict[str, Any] = {} if allocator is None else {"allocator": allocator}
    if report is not None and name == "cpu":
        options["report"] = report
    with device_failures():
        backend: Backend = import_module(BACKENDS[name]).open_backend(device, **options)
    return backend
