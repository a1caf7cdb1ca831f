"""Layers of Transformers' cache whose steps read what a selection chooses: all tokens are held, and the others are masked."""

from typing import Any

import torch

from elastickv.evaluation.kv_formats.format_layer import SixteenBitLayer
from elastickv.evaluation.kv_selections.reference_selection import LayerSelection, attention_weights
from elastickv.evaluation.prefill import Tensor
from elastickv.transformers.attention import Call, Pending, carrying


class SelectedLayer(SixteenBitLayer):
    """Exact 16-bit keys and values, of which a step attends to some.

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
        """Attend to the tokens that are selected: (batch, new, query_heads, head_dim) of the query's dtype.

        Several new tokens are as many steps: each selects among the tokens up to its own.
        """
        keys, values = pending.keys.float(), pending.values.float()
        queries = call.query.float().unflatten(1, (keys.shape[1], -1))
        first = keys.shape[2] - queries.shape[3]
        steps = [
            self._step(queries[..., step, :], keys[:, :, : first + step + 1], values[:, :, : first + step + 1], call)
            for step in range(queries.shape[3])
        ]
        return torch.stack(steps, 1).to(call.query.dtype)

    def _step(self, query: Tensor, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Return the (batch, query_heads, head_dim) outputs of one step's (batch, kv_heads, group, head_dim) queries."""
        chosen = self._selection.select(query, keys)
        products = (query @ keys.mT * call.scaling)[..., None, :]
        weights = attention_weights(products, chosen[:, :, None, None], call.softcap, call.sinks)[..., 0, :]
        self._selection.attended(weights)
        return (weights @ values).flatten(1, 2)
