"""Layers of Transformers' cache whose steps read what a selection chooses: all tokens are held, and the others are masked."""

from typing import Any

import torch

from elastickv.evaluation.kv_formats.format_layer import SixteenBitLayer
from elastickv.evaluation.kv_selections.reference_selection import LayerSelection, attention_weights
from elastickv.evaluation.prefill import Tensor
from elastickv.transformers.attention import Call, Pending, carrying


class SelectedLayer(SixteenBitLayer):
    """Exact 16-bit keys and values, of which a step of one token a row attends to some.

    Attributes
    ----------
    number : the layer's index in the model.
    """

    def __init__(self, number: int, selection: LayerSelection) -> None:
        super().__init__()
        self.number, self._selection = number, selection

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, kv_heads, new, head_dim) tokens and return all, so that attention finds this layer."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        pending = Pending(self, keys, values)
        return carrying(keys, pending), carrying(values, pending)

    def attend(self, pending: Pending, call: Call) -> torch.Tensor:
        """Attend to the tokens that are selected: (batch, 1, query_heads, head_dim) of the query's dtype."""
        keys, values = pending.keys.float(), pending.values.float()
        query = call.query.float().unflatten(1, (keys.shape[1], -1))
        chosen = self._selection.select(query[..., 0, :], keys)
        products = query @ keys[:, :, None].mT * call.scaling
        weights = attention_weights(products, chosen[:, :, None, None], call.softcap, call.sinks)
        self._selection.attended(weights[..., 0, :])
        outputs = weights @ values[:, :, None]
        return outputs.flatten(1, 2).transpose(1, 2).to(call.query.dtype).contiguous()
