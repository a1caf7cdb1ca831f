"""The attention and mask functions that Transformers calls by the name 'elastickv'.

The attention function sees no cache, and a cache's `update` sees no query. So `update` returns keys that carry their layer, and
the attention function passes the query to that layer. Keys without a layer (no cache, a stock cache, windowed layers) get the
framework's own attention.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol, TypeVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from elastickv.errors import UsageError
from elastickv.transformers.padding import MaskedPositions, check_mask_agrees

IMPLEMENTATION = "elastickv"
EAGER_IMPLEMENTATION = "elastickv_eager"
_CARRIES = "elastickv_pending"
_Function = TypeVar("_Function", bound=Callable[..., object])


def breaks_graph(function: _Function) -> _Function:
    """Let compiled models call a function between two graphs: kernels take addresses, and a cache counts on the host."""
    disabled: _Function = torch.compiler.disable(function)
    return disabled


class AttendingLayer(Protocol):
    """A cache layer that attends for the model.

    Attributes
    ----------
    number : the layer's index in the model.
    """

    number: int

    def attend(self, pending: Pending, call: Call) -> torch.Tensor:
        """Store the new tokens and attend: (batch, new, query_heads, head_dim)."""


@dataclass
class Pending:
    """New tokens of a layer that wait for their query: (batch, kv_heads, new, head_dim) each."""

    layer: AttendingLayer
    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class Call:
    """One call of the attention function.

    Attributes
    ----------
    module : the calling attention module.
    query : (batch, query_heads, new, head_dim).
    mask : bool or additive, (batch or 1, 1, new, keys); None: every query sees the tokens up to its own.
    scaling : factor on the products of queries and keys.
    eager : the model's own attention where the framework would call it; None where it would call its fast attention.
    rest : the remaining keyword arguments.
    """

    module: torch.nn.Module
    query: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    eager: Callable[..., Any] | None
    rest: dict[str, Any]

    @property
    def softcap(self) -> float | None:
        """Cap of the scores, or None. The framework's fast attention never caps scores."""
        return None if self.eager is None else self.rest.get("softcap")

    @property
    def sinks(self) -> torch.Tensor | None:
        """(query_heads,) scores of attention sinks, or None."""
        return None if self.eager is None else self.rest.get("s_aux")

    def exact(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the framework's attention over all keys and values: (batch, new, query_heads, head_dim).

        The mask is that of an elastic layer: boolean, None for a causal one.
        """
        mask = self.mask if self.eager is None else additive(self.mask, self.query, key.shape[2])
        return self._framework(key, value, mask)[0]

    def stock(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what the framework's attention returns where no elastic layer is involved: outputs and weights, or None."""
        mask = self.mask
        if self.eager is not None and mask is not None:
            mask = additive(mask, self.query, key.shape[2])
        return self._framework(key, value, mask)

    def _framework(
        self, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attention = sdpa_attention_forward if self.eager is None else self.eager
        outputs: tuple[torch.Tensor, torch.Tensor | None] = attention(
            self.module, self.query, key, value, mask, scaling=self.scaling, **self.rest
        )
        return outputs


@cache
def supports_sdpa(kind: Any) -> bool:
    """Whether all models defined in the attention module's source file may use the framework's fast attention."""
    home = vars(sys.modules[kind.__module__])
    models: list[Any] = [value for value in home.values() if isinstance(value, type) and issubclass(value, PreTrainedModel)]
    return all(model._supports_sdpa for model in models if model.__module__ == kind.__module__)


def eager_of(module: torch.nn.Module) -> Callable[..., Any]:
    """Return the attention function that the source file of the module's class, or of a parent class, defines.

    Raises
    ------
    UsageError : if it defines none.
    """
    for kind in type(module).__mro__:
        eager: Callable[..., Any] | None = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    name = type(module).__module__
    raise UsageError(f"{type(module).__name__} cannot use sdpa, and {name} defines no eager_attention_forward")


def additive(mask: torch.Tensor | None, query: torch.Tensor, keys: int) -> torch.Tensor | None:
    """Return a mask as numbers to add to scores; without a mask, those of a causal mask."""
    new = query.shape[2]
    if mask is None:
        if new == 1:
            return None
        mask = torch.ones(new, keys, dtype=torch.bool, device=query.device).tril(keys - new)[None, None]
    if mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, lowest)


def carrying(tensor: torch.Tensor, pending: Pending) -> torch.Tensor:
    """Return an alias of keys or values that leads the attention function to their layer."""
    alias = tensor.detach()
    setattr(alias, _CARRIES, pending)
    return alias


def elastic_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend through the elastic layer that the keys carry, or with the framework's attention.

    Parameters
    ----------
    query : (batch, query_heads, new, head_dim).
    key, value : (batch, kv_heads, keys, head_dim); only the new tokens where they carry a layer.
    dropout : probability, for the framework's attention. It stands where all attention functions of Transformers have it:
        wrappers of them, such as kvpress's, pass it by position.

    Returns
    -------
    outputs : (batch, new, query_heads, head_dim) of the query's dtype.
    weights : those that the framework's attention returns without an elastic layer, or None.
    """
    kind: Any = type(module)
    eager = None if supports_sdpa(kind) else partial(_causal_without_mask, eager_of(module))
    return _attend(module, query, key, value, attention_mask, scaling, eager, kwargs | {"dropout": dropout})


def elastic_attention_eager(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend like `elastic_attention`, for a model that is set to use its own attention, 'eager'."""
    return _attend(module, query, key, value, attention_mask, scaling, eager_of(module), kwargs | {"dropout": dropout})


def _causal_without_mask(
    eager: Callable[..., Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **rest: Any,
) -> Any:
    """Call a model's own attention, which takes no mask for full attention, with masks that leave a causal one out."""
    if mask is None and getattr(module, "is_causal", True):
        mask = additive(None, query, key.shape[2])
    return eager(module, query, key, value, mask, **rest)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    eager: Callable[..., Any] | None,
    rest: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = Call(module, query, mask, scale, eager, rest)
    # Some models convert keys or values in between, and the new tensor loses the attribute.
    pending: Pending | None = getattr(key, _CARRIES, None) or getattr(value, _CARRIES, None)
    return call.stock(key, value) if pending is None else (_attend_stored(pending, call), None)


@breaks_graph
def _attend_stored(pending: Pending, call: Call) -> torch.Tensor:
    """Attend through an elastic layer. `torch.compile` breaks its graph here: kernels take addresses."""
    return pending.layer.attend(pending, call)


def elastic_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return the boolean mask that the framework builds for its own fast attention, or None where none is needed.

    An elastic layer only needs a mask of the new tokens (`get_mask_sizes`): it remembers the prompt's padding from its first
    pass.

    Raises
    ------
    UsageError : if a two-dimensional mask contradicts that padding.
    """
    return _mask(sdpa_mask, args, kwargs)


def elastic_mask_eager(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return the mask like `elastic_mask`, but without an elastic layer the one that a model's own attention gets."""
    return _mask(eager_mask, args, kwargs)


def _mask(framework: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    if isinstance(kwargs.get("kv_offset"), MaskedPositions):
        return _mask_of_new_tokens(*args, **kwargs)
    mask: torch.Tensor | None = framework(*args, **kwargs)
    return mask


@breaks_graph
def _mask_of_new_tokens(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return the mask of an elastic layer's new tokens."""
    token_mask = kwargs.get("attention_mask")
    if token_mask is not None:
        check_mask_agrees(token_mask, kwargs["kv_offset"], kwargs["kv_length"])
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def implementation_for(present: str | None) -> str:
    """Return the implementation that behaves like the `present` one wherever no elastic cache is used."""
    return EAGER_IMPLEMENTATION if present in ("eager", EAGER_IMPLEMENTATION) else IMPLEMENTATION


def register() -> None:
    """Register 'elastickv' with Transformers. Importing this module does so."""
    AttentionInterface.register(IMPLEMENTATION, elastic_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, elastic_mask)
    AttentionInterface.register(EAGER_IMPLEMENTATION, elastic_attention_eager)
    AttentionMaskInterface.register(EAGER_IMPLEMENTATION, elastic_mask_eager)


register()
