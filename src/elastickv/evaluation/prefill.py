"""Exact prefill by Transformers' own attention, once for all recipes: recipes differ only in what decoding reads."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
import transformers
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from elastickv.evaluation.layer_progress import Progress, layer_progress
from elastickv.transformers.cache_argument import CACHE_ARGUMENT
from elastickv.transformers.model_support import stock_layers, text_config

Tensor: TypeAlias = Any
_ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)
# Tokens that a pass over rows reads at least, by kind of device: a small model takes longer to launch than to read one row.
TOKENS_PER_PASS = {"cpu": 1, "cuda": 16384}
# About the most tokens of a row that a pass reads. For float32 with grouped heads PyTorch has only the kernel that stores all
# scores, 47 GB for 28672 tokens and 14 heads. A part that follows other tokens has a mask, with which another kernel runs.
TOKENS_AT_ONCE = {"cuda": 4096}


@dataclass(frozen=True)
class Prefill:
    """Keys, values and logits of rows of equal length after exact attention.

    Attributes
    ----------
    keys, values : for each layer a (rows, kv_heads, tokens, head_dim) tensor; None for layers without attention.
    logits : (rows, positions, vocabulary) float32 on the model's device, of the last positions that were read.
    ids : the token ids of each row in keys and values.
    states : layer -> Transformers' own layer with its state after these tokens, where the layer has no attention.
    copies : how many rows of a cache each row fills, one after the other.
    """

    keys: list[Tensor]
    values: list[Tensor]
    logits: Tensor
    ids: Sequence[Sequence[int]] = ()
    states: dict[int, Any] = field(default_factory=dict)
    copies: int = 1

    def repeated(self, copies: int) -> "Prefill":
        """Return these rows, each `copies` times in a row, in the same memory; the logits are left out."""
        return replace(self, logits=self.logits[:, :0], copies=self.copies * copies)

    @property
    def rows(self) -> int:
        """Rows of a cache that is filled."""
        return self.copies * int(self._of_attention.shape[0])

    @property
    def tokens(self) -> int:
        """Tokens of every row in keys and values."""
        return int(self._of_attention.shape[2])

    @property
    def _of_attention(self) -> Tensor:
        return next(keys for keys in self.keys if keys is not None)

    def fill(self, layers: list[Any], hold: Callable[[Any, Tensor, Tensor], None]) -> None:
        """Fill the empty layers of a cache; those with a state are replaced by copies of it.

        Parameters
        ----------
        hold : called with a layer that has attention, its keys and its values.
        """
        for number, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            if number in self.states:
                layers[number] = copy.deepcopy(self.states[number])
                if self.copies > 1:
                    layers[number].reorder_cache(torch.arange(self.rows) // self.copies)
            elif self.copies > 1:
                hold(layers[number], *(each.repeat_interleave(self.copies, dim=0) for each in (keys, values)))
            else:
                hold(layers[number], keys, values)


def has_attention_everywhere(model: Any) -> bool:
    """Return whether every layer has keys and values, of all tokens or of a window, and none has a state."""
    return all(type(layer) in _ATTENTION for layer in stock_layers(text_config(model)))


def prefill(
    model: Any, rows: Sequence[Sequence[int]], stored_tokens: int, logit_count: int, progress: Progress | None = None
) -> Prefill:
    """Read rows of tokens, all of them of `stored_tokens` + `logit_count` tokens.

    Rows are read one by one, on a GPU as many together as have 16384 tokens, and longer ones in parts. Where layers have a
    state instead of keys and values (linear attention, Mamba), which can't be cut back to `stored_tokens`, all rows are read at
    once and the last tokens one by one.

    Parameters
    ----------
    rows : token ids, all rows of one length.
    stored_tokens : number of first positions of which keys and values are returned.
    logit_count : number of last positions of which logits are returned.
    progress : called with (layers done, layers of all rows), or rows on a GPU, or tokens where they are read one by one.
    """
    if has_attention_everywhere(model):
        return _row_by_row(model, rows, stored_tokens, logit_count, progress)
    return _step_by_step(model, rows, stored_tokens, logit_count, progress)


def _row_by_row(
    model: Any, rows: Sequence[Sequence[int]], stored_tokens: int, logit_count: int, progress: Progress | None
) -> Prefill:
    keys: list[Tensor] = []
    values: list[Tensor] = []
    logits = torch.empty(len(rows), logit_count, text_config(model).vocab_size, device=model.device)
    with torch.inference_mode(), layer_progress(model, progress, len(rows)):
        at_once = max(1, TOKENS_PER_PASS.get(model.device.type, 1) // len(rows[0]))
        for begin in range(0, len(rows), at_once):
            some = slice(begin, min(begin + at_once, len(rows)))
            # Without a configuration all layers keep all tokens; a layer with a window is masked to it.
            cache = transformers.DynamicCache()
            ids = torch.tensor([list(row) for row in rows[some]], device=model.device)
            *earlier, last = ids.split(_parts(ids.shape[1], logit_count, TOKENS_AT_ONCE.get(model.device.type)), 1)
            for part in earlier:
                model(input_ids=part, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
            logits[some] = model(input_ids=last, logits_to_keep=logit_count, **{CACHE_ARGUMENT: cache}).logits.float()
            for layer, store in enumerate(cache.layers):
                if begin == 0:
                    for states in (keys, values):
                        states.append(store.keys.new_empty(len(rows), store.keys.shape[1], stored_tokens, store.keys.shape[3]))
                keys[layer][some] = store.keys[:, :, :stored_tokens]
                values[layer][some] = store.values[:, :, :stored_tokens]
            if progress is not None and model.device.type != "cpu":
                progress(some.stop, len(rows))
    return Prefill(keys, values, logits, [row[:stored_tokens] for row in rows])


def _parts(tokens: int, logit_count: int, most: int | None) -> list[int]:
    """Return the lengths of the parts in which rows are read: `most` tokens, and a last one that has all logits."""
    whole = 0 if most is None else max(0, tokens - logit_count) // most
    return [*[most or 0] * whole, tokens - whole * (most or 0)]


def _step_by_step(
    model: Any, rows: Sequence[Sequence[int]], stored_tokens: int, logit_count: int, progress: Progress | None
) -> Prefill:
    ids = torch.tensor([list(row) for row in rows], device=model.device)
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=ids[:, :stored_tokens], logits_to_keep=1, use_cache=True, **{CACHE_ARGUMENT: cache})
        has_keys = [type(layer) is DynamicLayer for layer in cache.layers]
        keys, values = (
            [getattr(layer, name).clone() if own else None for layer, own in zip(cache.layers, has_keys, strict=True)]
            for name in ("keys", "values")
        )
        states = {n: copy.deepcopy(layer) for n, (layer, own) in enumerate(zip(cache.layers, has_keys, strict=True)) if not own}
        logits = torch.empty(len(rows), ids.shape[1] - stored_tokens, text_config(model).vocab_size, device=model.device)
        for step in range(logits.shape[1]):
            if progress is not None:
                progress(step, logits.shape[1])
            token = ids[:, stored_tokens + step, None]
            logits[:, step] = model(input_ids=token, use_cache=True, **{CACHE_ARGUMENT: cache}).logits[:, -1].float()
    return Prefill(keys, values, logits[:, -logit_count:], [row[:stored_tokens] for row in rows], states)
