"""Whether a model's pass can be captured as a graph, and what the graph depends on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch

_HARMLESS = ("elastickv", "torch", "transformers")  # packages whose hooks consist of tensor operations


class NotCapturable(Exception):
    """A pass cannot be captured; the message says why."""


def structure_of(model: Any, device: torch.device) -> Hashable:
    """Return what a graph depends on in a model: its mode and the addresses of its weights.

    Raises
    ------
    NotCapturable : if weights are on another device, or modules run code that a replay would skip.
    """
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            raise NotCapturable("its weights are placed by accelerate (device_map over several devices, or offloaded)")
        if module is not model:
            _check_hooks(type(module).__name__, (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))
    addresses = []
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device != device:
            raise NotCapturable(f"a weight is on {tensor.device}, and the cache on {device}")
        addresses.append(getattr(tensor, "_local_tensor", tensor).data_ptr())
    return hash((model.training, *addresses))


def _check_hooks(owner: str, hooks: Iterable[Callable[..., Any]]) -> None:
    for hook in hooks:
        home = getattr(getattr(hook, "func", hook), "__module__", None) or ""
        if home.split(".")[0] not in _HARMLESS:
            raise NotCapturable(f"a {owner} has a hook, which a replay would not run")


def signature_of(inputs: Mapping[str, Any], device: torch.device) -> Hashable:
    """Return what a graph depends on in a call: shapes and dtypes of tensors, and all other values.

    Raises
    ------
    NotCapturable : if a tensor is on another device, or a value is not hashable.
    """
    parts: list[Hashable] = []
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            if value.device != device:
                raise NotCapturable(f"{name} is on {value.device}, and the cache on {device}")
            parts.append((name, value.shape, value.dtype))
        else:
            try:
                hash(value)
            except TypeError:
                raise NotCapturable(f"{name} is a {type(value).__name__}, which is not hashable") from None
            parts.append((name, type(value), value))
    return tuple(parts)


def check_mode() -> None:
    """Check that neither autograd nor autocast is enabled.

    Raises
    ------
    NotCapturable : if one is.
    """
    if torch.is_grad_enabled():
        raise NotCapturable("gradients are enabled: use torch.no_grad() or torch.inference_mode()")
    if torch.is_autocast_enabled():
        raise NotCapturable("autocast is enabled")
