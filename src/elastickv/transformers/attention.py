"""The attention and mask functions that Transformers calls by the name 'elastickv'.

The attention function sees no cache, and a cache's `update` sees no query. So `update` returns keys that carry their layer, and
the attention function hands the query over to it. Keys that carry none (no cache, a stock cache, windowed layers) get the
framework's own attention.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from elastickv.errors import UsageError

if TYPE_CHECKING:
    from elastickv.transformers.layer import ElasticLayer

IMPLEMENTATION = "elastickv"
_CARRIES = "elastickv_pending"


@dataclass
class Pending:
    """New tokens of a layer that wait for their query: (batch, kv_heads, new, head_dim) each."""

    layer: ElasticLayer
    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class Call:
    """One call of the attention function.

    Attributes
    ----------
    module : the attention module that calls.
    query : (batch, query_heads, new, head_dim).
    mask : bool or additive, (batch or 1, 1, new, keys); None: every query sees the tokens up to its own.
    dropout, scaling : as Transformers gives them.
    softcap : cap of the scores, or None.
    sinks : (query_heads,) scores of attention sinks, or None.
    rest : what else the model passes on.
    """

    module: torch.nn.Module
    query: torch.Tensor
    mask: torch.Tensor | None
    dropout: float
    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None
    rest: dict[str, Any]

    def stock(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return what the framework's attention makes of all the keys and values: (batch, new, query_heads, head_dim)."""
        if self.softcap is None and self.sinks is None:
            arguments = (self.module, self.query, key, value, self.mask)
            output, _ = sdpa_attention_forward(*arguments, dropout=self.dropout, scaling=self.scaling, **self.rest)
            return output
        name = type(self.module).__module__
        eager = getattr(sys.modules[name], "eager_attention_forward", None)
        if eager is None:
            raise UsageError(f"{type(self.module).__name__} caps scores or has sinks, and {name} has no attention that does")
        own = {"softcap": self.softcap, "s_aux": self.sinks}
        given = {word: what for word, what in own.items() if what is not None}
        mask = additive(self.mask, self.query, key.shape[2])
        arguments = (self.module, self.query, key, value, mask)
        output, _ = eager(*arguments, dropout=self.dropout, scaling=self.scaling, **given, **self.rest)
        return output


def additive(mask: torch.Tensor | None, query: torch.Tensor, keys: int) -> torch.Tensor | None:
    """Return a mask as the numbers that are added to scores; one without a mask gets what `is_causal` stands for."""
    new = query.shape[2]
    if mask is None:
        if new == 1:
            return None
        mask = torch.ones(new, keys, dtype=torch.bool, device=query.device).tril(keys - new)[None, None]
    if mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, lowest)


def carrying(keys: torch.Tensor, pending: Pending) -> torch.Tensor:
    """Return the same keys, which lead the attention function to their layer."""
    alias = keys.detach()
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
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend through the elastic layer that the keys carry, or as the framework does.

    Parameters
    ----------
    query : (batch, query_heads, new, head_dim).
    key, value : (batch, kv_heads, keys, head_dim); the new tokens alone where they carry a layer.

    Returns
    -------
    outputs : (batch, new, query_heads, head_dim) of the query's dtype.
    weights : None.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = Call(module, query, attention_mask, dropout, scale, softcap, s_aux, kwargs)
    pending: Pending | None = getattr(key, _CARRIES, None)
    if pending is None:
        return call.stock(key, value), None
    return pending.layer.attend(pending, call), None


def elastic_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return the boolean mask that the framework builds for its own fast attention, or None where none is needed.

    An elastic layer asks for the new tokens alone (`get_mask_sizes`): where a prompt was padded is known from its first pass.
    """
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def register() -> None:
    """Make 'elastickv' known to Transformers; importing this module does."""
    AttentionInterface.register(IMPLEMENTATION, elastic_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, elastic_mask)


register()
