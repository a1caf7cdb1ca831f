"""Scores of a prompt's tokens in every layer, from the queries and hidden states that full attention reads it with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicLayer

from elastickv.evaluation.attention_inputs import attention_modules
from elastickv.evaluation.kv_selections.reference_selection import LayerPrompt
from elastickv.evaluation.prefill import Prefill, Tensor
from elastickv.transformers.attention import IMPLEMENTATION, Call, Pending, carrying
from elastickv.transformers.cache_argument import CACHE_ARGUMENT

Score = Callable[[LayerPrompt], Tensor]


class _ObservedLayer(DynamicLayer):  # type: ignore[misc]
    """A layer that attends exactly and scores its tokens.

    Attributes
    ----------
    number : the layer's index in the model.
    scores : (kv_heads, tokens) float32.
    """

    def __init__(self, number: int, score: Score, arguments: dict[Any, dict[str, Any]]) -> None:
        super().__init__()
        self.number, self._score, self._arguments = number, score, arguments
        self.scores: Tensor = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        pending = Pending(self, keys, values)
        return carrying(keys, pending), carrying(values, pending)

    def attend(self, pending: Pending, call: Call) -> torch.Tensor:
        self.scores = self._score(
            LayerPrompt(
                queries=call.query,
                keys=pending.keys,
                values=pending.values,
                scaling=call.scaling,
                softcap=call.softcap,
                sinks=call.sinks,
                module=call.module,
                arguments=self._arguments[call.module],
            )
        ).float()
        return call.exact(pending.keys, pending.values)


def prompt_scores(model: Any, start: Prefill, score: Score) -> dict[int, Tensor]:
    """Read the prompts of a prefill again, row by row, and return the scores of each layer with full attention.

    Parameters
    ----------
    score : a layer's prompt -> (kv_heads, tokens) scores.

    Returns
    -------
    scores : layer -> (rows, kv_heads, tokens) float32.
    """
    by_layer: dict[int, list[Tensor]] = {}
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        with torch.inference_mode(), _arguments(model) as arguments:
            for row in start.ids:
                cache = transformers.DynamicCache(config=model.config)
                for number, layer in enumerate(cache.layers):
                    if type(layer) is DynamicLayer:
                        cache.layers[number] = _ObservedLayer(number, score, arguments)
                ids = torch.tensor([list(row)], device=model.device)
                model(input_ids=ids, logits_to_keep=1, use_cache=True, **{CACHE_ARGUMENT: cache})
                for layer in cache.layers:
                    if isinstance(layer, _ObservedLayer):
                        by_layer.setdefault(layer.number, []).append(layer.scores)
    finally:
        model.set_attn_implementation(before)
    return {number: torch.stack(rows) for number, rows in by_layer.items()}


@contextmanager
def _arguments(model: Any) -> Iterator[dict[Any, dict[str, Any]]]:
    """Note the named arguments of the attention modules' latest calls; the first unnamed one is `hidden_states`."""
    noted: dict[Any, dict[str, Any]] = {}

    def note(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        noted[module] = named | ({"hidden_states": arguments[0]} if arguments else {})

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for _, module in attention_modules(model)]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()
