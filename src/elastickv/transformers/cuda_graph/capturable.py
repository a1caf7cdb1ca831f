"""What keeps a model's pass from being captured as a graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch

_HARMLESS = ("elastickv", "torch", "transformers")  # whose hooks are made of tensor operations


class NotCapturable(Exception):
    """Tells why a pass cannot be captured."""


def structure_of(model: Any, device: torch.device) -> Hashable:
    """Return what a graph takes for granted of a model: where its weights lie.

    Raises
    ------
    NotCapturable : if weights lie elsewhere, or modules run code that a replay would leave out.
    """
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            raise NotCapturable("its weights are placed by accelerate (device_map over several devices, or offloaded)")
        if module is not model:
            _check_hooks(type(module).__name__, (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))
    places = []
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device != device:
            raise NotCapturable(f"a weight lies on {tensor.device}, and the cache on {device}")
        places.append(getattr(tensor, "_local_tensor", tensor).data_ptr())
    return hash((model.training, *places))


def _check_hooks(owner: str, hooks: Iterable[Callable[..., Any]]) -> None:
    for hook in hooks:
        home = getattr(getattr(hook, "func", hook), "__module__", None) or ""
        if home.split(".")[0] not in _HARMLESS:
            raise NotCapturable(f"a {owner} has a hook, which a replay would not run")


def signature_of(inputs: Mapping[str, Any], device: torch.device) -> Hashable:
    """Return what a graph takes for granted of a call: shapes of tensors, and all other values.

    Raises
    ------
    NotCapturable : if a tensor lies elsewhere, or a value cannot be told from another.
    """
    parts: list[Hashable] = []
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            if value.device != device:
                raise NotCapturable(f"{name} lies on {value.device}, and the cache on {device}")
            parts.append((name, value.shape, value.dtype))
        else:
            try:
                hash(value)
            except TypeError:
                raise NotCapturable(f"{name} is a {type(value).__name__}, which may hold anything") from None
            parts.append((name, type(value), value))
    return tuple(parts)


def check_mode() -> None:
    """Refuse to capture what autograd or autocast would have a part in.

    Raises
    ------
    NotCapturable : naming which.
    """
    if torch.is_grad_enabled():
        raise NotCapturable("gradients are enabled: use torch.no_grad() or torch.inference_mode()")
    if torch.is_autocast_enabled():
        raise NotCapturable("autocast is enabled")
