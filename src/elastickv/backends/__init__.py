"""Decode steps on devices: one folder for each kind of device. `load` opens one and imports only that one."""

from elastickv.backends.protocol import Allocator, Backend, Ceilings, DeviceInfo, DeviceMemory, Program
from elastickv.backends.registry import BACKENDS, load

__all__ = ["BACKENDS", "Allocator", "Backend", "Ceilings", "DeviceInfo", "DeviceMemory", "Program", "load"]
