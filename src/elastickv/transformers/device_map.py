"""Where the layers of a model compute that Accelerate has laid over several devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_OFFLOADED = ("cpu", "disk")


def layer_devices(layers: Sequence[int], device_map: Mapping[str, Any] | None) -> dict[int, str | None]:
    """Return the device on which each of `layers` computes; None where it is not told.

    Parameters
    ----------
    device_map : the model's `hf_device_map`: a device for each module, by name; None for a model on one device. What it
        offloads computes on its first GPU.
    """
    devices = {name: _device_name(at) for name, at in (device_map or {}).items()}
    first_gpu = next((at for at in devices.values() if at not in _OFFLOADED), "cpu")
    told: dict[int, str] = {}
    for name, at in devices.items():
        number = next(filter(str.isdecimal, name.split(".")), None)
        if number is not None:
            told.setdefault(int(number), first_gpu if at in _OFFLOADED else at)
    whole = devices.get("")
    return {layer: told.get(layer, first_gpu if whole in _OFFLOADED else whole) for layer in layers}


def layers_beside(layer: int, layers: Sequence[int], device_map: Mapping[str, Any] | None) -> list[int]:
    """Return which of `layers` compute on the device of `layer`, itself among them; `device_map` as in `layer_devices`."""
    places = layer_devices(layers, device_map)
    return [other for other in layers if places[other] == places[layer]]


def _device_name(told: Any) -> str:
    if isinstance(told, int):
        return f"cuda:{told}"
    return "cuda:0" if str(told) == "cuda" else str(told)
