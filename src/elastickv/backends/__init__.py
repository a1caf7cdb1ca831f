"""How a decode step runs: one folder a device kind. `load` picks one; nothing is imported before it is asked for."""

from elastickv.backends.protocol import Backend, Ceilings, DeviceInfo, Program
from elastickv.backends.registry import BACKENDS, load

__all__ = ["BACKENDS", "Backend", "Ceilings", "DeviceInfo", "Program", "load"]
