"""Layers of Transformers' cache whose tokens have 16 bits, or have been through a KV format.

What comes back from a format is held in the model's dtype, so that these layers save no memory and no time. They only grow.
"""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from elastickv.evaluation.kv_formats.reference_format import ReferenceFormat, StoredPlane
from elastickv.evaluation.prefill import Tensor


class SixteenBitLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in 16 bits: those of a float32 model are rounded to bfloat16, as an ElasticCache rounds exact tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, kv_heads, new, head_dim) tokens and return all."""
        keys, values = super().update(_in_16_bits(key_states), _in_16_bits(value_states), *args, **kwargs)
        return keys, values


class FormatLayer(SixteenBitLayer):
    """Keys and values as attention reads them: rounded to a format once, as soon as they are old enough."""

    def __init__(self, stored_as: ReferenceFormat) -> None:
        super().__init__()
        self._key_store = _Store(stored_as.keys, stored_as.sinks)
        self._value_store = _Store(stored_as.values, stored_as.sinks)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, kv_heads, new, head_dim) tokens and return all, with those that are old enough rounded."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self._key_store.round_old(keys)
        self._value_store.round_old(values)
        return keys, values


def _in_16_bits(states: Tensor) -> Tensor:
    return states.bfloat16().float() if states.dtype == torch.float32 else states


class _Store:
    """How many tokens of K, or of V, are in the format so far, and the layer's scale where it has one."""

    def __init__(self, plane: StoredPlane, sinks: int) -> None:
        self._plane, self._sinks = plane, sinks
        self._tokens = 0
        self._scale: Tensor | None = None

    def round_old(self, states: Tensor) -> None:
        """Round in place what has become old enough since the last call."""
        before, self._tokens = self._tokens, self._plane.stored_tokens(states.shape[-2], self._sinks)
        if self._tokens > before:
            rows = states[..., self._sinks + before : self._sinks + self._tokens, :]
            x = rows.float()
            if before == 0:
                self._scale = self._plane.layer_scale(x)
            rows.copy_(self._plane.read_back(x, self._scale))
