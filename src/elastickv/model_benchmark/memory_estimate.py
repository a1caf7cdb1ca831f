"""How much memory a model, its caches and a prompt need: told before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from elastickv.backends import load
from elastickv.errors import UsageError
from elastickv.recipe import AttentionShape, Recipe, for_ratio, resolve, stored_bytes

GIB = 1 << 30
_TRIED = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_LEAST_CONTEXT = 256
# A prompt's pass holds about so many rows of the residual stream, and of the feed-forward layer, at once.
_HIDDEN_ROWS, _INTERMEDIATE_ROWS = 6, 3
# Beside what is counted: fragments, the allocator's rounding, logits.
_SLACK = 1.05


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run of a model would hold.

    Attributes
    ----------
    name : of the model.
    weights_bytes : of the model.
    layers, attention : layers, and the shape of one for all rows.
    hidden, intermediate : channels.
    dtype : 'fp32', 'fp16' or 'bf16'; `element_bytes` is its size.
    """

    name: str
    weights_bytes: int
    layers: int
    attention: AttentionShape
    hidden: int
    intermediate: int
    dtype: str
    element_bytes: int

    def prompt_bytes(self, tokens: int) -> int:
        """Return roughly what a prompt's pass holds beside weights and caches."""
        rows = self.attention.batch * tokens * self.element_bytes
        return rows * (_HIDDEN_ROWS * self.hidden + _INTERMEDIATE_ROWS * self.intermediate)

    def stock_bytes(self, tokens: int) -> int:
        """Return the bytes of a stock cache."""
        elements = 2 * self.attention.batch * self.attention.kv_heads * self.attention.head_dim
        return self.layers * elements * tokens * self.element_bytes

    def elastic_bytes(self, tokens: int, recipe: Recipe) -> int:
        """Return the bytes of an elastic cache whose layers have a recipe."""
        one = replace(self.attention, batch=1)
        return self.layers * self.attention.batch * stored_bytes(recipe, [tokens], one, self.dtype)

    def check(self, tokens: int, wanted: Mapping[str, Any], free_bytes: int, loaded: bool = False) -> None:
        """Refuse what an elastic cache would not fit with.

        Parameters
        ----------
        tokens : of prompt and text, a row.
        wanted : compress and recipe, as `ElasticCache.for_model` takes them.
        loaded : whether the weights are held already.

        Raises
        ------
        UsageError : telling how much is needed, and which ratio or context would fit.
        """
        weights = 0 if loaded else self.weights_bytes
        free = free_bytes / _SLACK

        def needed(count: int, ratio: float | None) -> float:
            recipe = self._recipe(count, wanted) if ratio is None else self._solved(ratio, count)
            return weights + self.elastic_bytes(count, recipe) + self.prompt_bytes(count)

        if needed(tokens, None) <= free:
            return
        rows = "" if self.attention.batch == 1 else f"{self.attention.batch} x "
        ratios = [ratio for ratio in _TRIED if ratio > (wanted.get("compress") or 1) and needed(tokens, ratio) <= free]
        lengths = [1 << power for power in range(tokens.bit_length(), 7, -1) if 1 << power < tokens]
        contexts = [length for length in lengths if length >= _LEAST_CONTEXT and needed(length, None) <= free]
        remedies = [f"`compress={ratios[0]:g}`"] if ratios else []
        remedies += [f"`context={contexts[0]}`"] if contexts else []
        remedy = " or ".join(remedies) + " would fit" if remedies else "nothing shorter would fit: a smaller model or dtype may"
        parts = "" if loaded else f" ({self.weights_bytes / GIB:.1f} of them weights)"
        raise UsageError(
            f"{self.name} in {self.dtype} with {rows}{tokens} tokens needs about {_SLACK * needed(tokens, None) / GIB:.1f} GiB"
            f"{parts} and {free_bytes / GIB:.1f} GiB are free; {remedy}"
        )

    def _recipe(self, tokens: int, wanted: Mapping[str, Any]) -> Recipe:
        text, ratio = wanted.get("recipe"), wanted.get("compress")
        if isinstance(text, str) and ratio is None:
            try:
                return Recipe.parse(text)
            except UsageError:
                return self._solved(1.0, tokens)  # a file: counted as if nothing were compressed
        if isinstance(text, str) and ratio is not None:
            return resolve(text, ratio, tokens, replace(self.attention, batch=1), self.dtype)
        return self._solved(ratio or 1.0, tokens)

    def _solved(self, ratio: float, tokens: int) -> Recipe:
        one = replace(self.attention, batch=1)
        try:
            return for_ratio(ratio, tokens, one, self.dtype)
        except UsageError:
            return for_ratio(1.0, tokens, one, self.dtype)


def free_bytes(device: str) -> int:
    """Return the memory that is free on a device."""
    import torch

    from elastickv.model_benchmark import memory_footprint

    place = torch.device(device)
    return memory_footprint.free_bytes(place) if place.type == "cuda" else load("cpu")[0].device.free_bytes
