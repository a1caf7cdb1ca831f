"""Which device computes each layer of a model that Accelerate has spread over several devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_OFFLOADED = ("cpu", "disk")


def layer_devices(layers: Sequence[int], device_map: Mapping[str, Any] | None) -> dict[int, str | None]:
    """Return the device on which each of `layers` computes; None where the map does not say.

    Parameters
    ----------
    device_map : the model's `hf_device_map`, from module names to devices; None for a model on one device. Offloaded modules
        compute on the first GPU.
    """
    devices = {name: _device_name(device) for name, device in (device_map or {}).items()}
    first_gpu = next((device for device in devices.values() if device not in _OFFLOADED), "cpu")
    by_layer: dict[int, str] = {}
    for name, device in devices.items():
        number = next(filter(str.isdecimal, name.split(".")), None)
        if number is not None:
            by_layer.setdefault(int(number), first_gpu if device in _OFFLOADED else device)
    whole = devices.get("")
    return {layer: by_layer.get(layer, first_gpu if whole in _OFFLOADED else whole) for layer in layers}


def layers_on_same_device(layer: int, layers: Sequence[int], device_map: Mapping[str, Any] | None) -> list[int]:
    """Return those of `layers` that compute on the device of `layer`, including `layer`; `device_map` as in `layer_devices`."""
    devices = layer_devices(layers, device_map)
    return [other for other in layers if devices[other] == devices[layer]]


def _device_name(device: Any) -> str:
    if isinstance(device, int):
        return f"cuda:{device}"
    return "cuda:0" if str(device) == "cuda" else str(device)
