"""Which GPU a script's tests ran on."""

from elastickv.backends import load
from elastickv.errors import UsageError


def gpu_name() -> dict[str, str | None]:
    """Return the device that tests marked `gpu` run on and its driver; nothing where they are skipped."""
    try:
        device = load("cuda")[0].device
    except UsageError:
        return {}
    return {"device": device.name, "driver": device.driver}
