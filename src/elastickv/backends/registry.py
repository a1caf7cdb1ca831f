"""Back ends by name. A new one is a folder and a line here."""

from importlib import import_module

from elastickv.backends.driver_errors import device_failures
from elastickv.backends.gpu_detection import gpu_present
from elastickv.backends.protocol import Backend
from elastickv.errors import UsageError

BACKENDS: dict[str, str] = {
    "cuda": "elastickv.backends.cuda",
    "cpu": "elastickv.backends.cpu",
}


def load(name: str = "auto", device: int | None = None) -> tuple[Backend, str | None]:
    """Return the back end called `name` and, for 'auto' on a machine with a GPU, why the GPU was passed over.

    'auto' with a device number means 'cuda': only there are devices numbered.

    Raises
    ------
    UsageError : if the name is unknown, or the back end cannot run here; the message says what to install.
    DeviceFailure : if the device does not work, or its kernels do not compile.
    """
    if name == "auto" and device is not None:
        name = "cuda"
    if name != "auto":
        if name not in BACKENDS:
            raise UsageError(f"back end {name!r} is unknown: choose auto, {', '.join(BACKENDS)}")
        return _open(name, device), None
    reason = None
    for candidate in BACKENDS:
        try:
            return _open(candidate, device if candidate == "cuda" else None), reason
        except UsageError as error:
            # Without a GPU nobody misses CUDA.
            reason = reason or (str(error) if candidate != "cuda" or gpu_present() else None)
    raise UsageError(reason or "no back end can run here")


def _open(name: str, device: int | None) -> Backend:
    with device_failures():
        backend: Backend = import_module(BACKENDS[name]).open_backend(device)
    return backend
