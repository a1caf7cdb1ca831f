"""Exact prefill by Transformers' own attention, once for all recipes: recipes differ only in what decoding reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import transformers

from elastickv.errors import UsageError
from elastickv.evaluation.layer_progress import Progress, layer_progress
from elastickv.transformers.cache_argument import CACHE_ARGUMENT

Tensor: TypeAlias = Any


@dataclass(frozen=True)
class Prefill:
    """Keys, values and logits of rows of equal length after exact attention.

    Attributes
    ----------
    keys, values : one (rows, kv_heads, tokens, head_dim) tensor for each layer.
    logits : (rows, positions, vocabulary) float32, of the last positions that were read.
    """

    keys: list[Tensor]
    values: list[Tensor]
    logits: Tensor

    @property
    def rows(self) -> int:
        """Sequences."""
        return int(self.keys[0].shape[0])

    @property
    def tokens(self) -> int:
        """Tokens of every row in keys and values."""
        return int(self.keys[0].shape[2])


def check_layers(model: Any) -> None:
    """Refuse a model with layers that do not attend to the whole context.

    Raises
    ------
    UsageError : naming the kinds of layers there are.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UsageError(
            f"model of type {config.model_type} has layers of {', '.join(sorted(kinds))}: "
            "fidelity is measured where every layer has full attention"
        )


def prefill(
    model: Any, rows: Sequence[Sequence[int]], stored_tokens: int, logit_count: int, progress: Progress | None = None
) -> Prefill:
    """Read rows of tokens one by one.

    Parameters
    ----------
    rows : token ids, all rows of one length.
    stored_tokens : number of first positions of which keys and values are returned.
    logit_count : number of last positions of which logits are returned.
    progress : called with (layers done, layers of all rows).
    """
    keys: list[Tensor] = []
    values: list[Tensor] = []
    logits = torch.empty(len(rows), logit_count, model.config.get_text_config(decoder=True).vocab_size)
    with torch.inference_mode(), layer_progress(model, progress, len(rows)):
        for number, row in enumerate(rows):
            cache = transformers.DynamicCache()
            ids = torch.tensor([list(row)], device=model.device)
            logits[number] = model(input_ids=ids, logits_to_keep=logit_count, **{CACHE_ARGUMENT: cache}).logits[0].float()
            for layer, store in enumerate(cache.layers):
                if number == 0:
                    for states in (keys, values):
                        states.append(store.keys.new_empty(len(rows), store.keys.shape[1], stored_tokens, store.keys.shape[3]))
                keys[layer][number] = store.keys[0, :, :stored_tokens]
                values[layer][number] = store.values[0, :, :stored_tokens]
    return Prefill(keys, values, logits)
