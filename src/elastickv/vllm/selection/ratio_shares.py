"""The shares of their pages that KV heads read, by the ratio that a request asks for."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from elastickv.recipe import Recipe
from elastickv.vllm.layer_formats import ServedModel, at_ratio

Shares = NDArray[np.float64]
RATIOS = 4096
"""Ratios whose shares are cached. More than the requests that run at a time, or each step would solve all of them again."""


def layer_shares(recipes: Mapping[int, Recipe], kv_heads: int) -> Shares:
    """Return the shares of layers in the order of their recipes, (layers, kv_heads); 1 in those that read every page."""
    return np.array([[recipe.fraction(head) for head in range(kv_heads)] for recipe in recipes.values()])


class RatioShares:
    """Shares of the pages in an engine's layers, solved once for each ratio.

    Parameters
    ----------
    recipes : of all layers of the model, for requests that ask for no ratio of their own.
    model : the served model; ratios are met at its context.
    """

    def __init__(self, recipes: Mapping[int, Recipe], model: ServedModel) -> None:
        self._recipes, self._model = recipes, model
        self._rows = {layer: row for row, layer in enumerate(recipes)}
        self._usual = layer_shares(recipes, model.shape.kv_heads)
        self._of_ratio = lru_cache(RATIOS)(self._solved)

    def of_layer(self, layer: int, ratio: float | None) -> Shares:
        """Return a layer's shares, (kv_heads,), at a request's own ratio; None: the server's."""
        return (self._usual if ratio is None else self._of_ratio(ratio))[self._rows[layer]]

    def of_layers(self, layers: list[int], ratio: float) -> Shares:
        """Return some layers' shares at a request's own ratio, (layers, kv_heads)."""
        return self._of_ratio(ratio)[[self._rows[layer] for layer in layers]]

    def _solved(self, ratio: float) -> Shares:
        return layer_shares(at_ratio(self._recipes, ratio, self._model), self._model.shape.kv_heads)
