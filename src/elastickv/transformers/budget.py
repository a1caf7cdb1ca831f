"""The share of its pages that each layer may read at the present context.

`compress=C` allows at most 1/C of the dense bytes. Formats are fixed with the prompt. The share of pages follows the context:
it is solved again whenever the context has grown by an eighth, and the recipes fix the proportions among layers and heads.
Below the context at which one page a head meets the budget, everything is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from elastickv.recipe import DENSE, PAGE_TOKENS, AttentionShape, Recipe
from elastickv.recipe.byte_counts import dense_bytes, interval_bytes
from elastickv.recipe.shape import MAX_CONTEXT

GROWTH = 8  # the share is solved again when the context has grown by 1 / GROWTH
_LEAST_SCALE = 2.0**-40
_HALVINGS = 40
_DIGITS = 10**6


def scaled(recipe: Recipe, scale: float | None) -> Recipe:
    """Return a recipe whose heads read `scale` times their shares of the pages. None: all pages."""
    if recipe.selection != "pages":
        return recipe
    if scale is None:
        return replace(recipe, fractions=(1.0,))
    if scale == 1:
        return recipe
    return replace(recipe, fractions=tuple(min(1.0, _short(fraction * scale)) for fraction in recipe.fractions))


def _short(fraction: float) -> float:
    """Return a fraction rounded down to few digits."""
    return max(math.floor(fraction * _DIGITS) / _DIGITS, _LEAST_SCALE)


@dataclass(frozen=True)
class Reading:
    """What decodes read in a range of contexts.

    Attributes
    ----------
    since, until : contexts, the last not included.
    scale : factor on the recipes' shares. None: everything is read.
    """

    since: int
    until: int
    scale: float | None


@dataclass(frozen=True)
class Budget:
    """The recipes of a model's layers, and the ratio that they have to meet.

    Attributes
    ----------
    recipes : layer -> recipe.
    shape : of a layer, for one sequence.
    dtype : the model's own.
    ratio : C, or None: the recipes' shares are used unchanged.
    context : the context that the recipes were solved for.
    fixed : whether the shares apply from `context` on, and everything is read below.
    """

    recipes: Mapping[int, Recipe]
    shape: AttentionShape
    dtype: str
    ratio: float | None
    context: int
    fixed: bool

    def anchor_offset(self, layer: int) -> int:
        """Return by how many steps a layer's anchors come early, so that layers do not have them at the same step."""
        return self.recipes[layer].layer_anchor_offset(sorted(self.recipes).index(layer), len(self.recipes))

    def ratio_at(self, context: int, scale: float | None) -> float:
        """Return dense bytes / bytes read, all layers together, averaged over an anchor interval."""
        read = sum(
            times * interval_bytes(scaled(recipe, scale), [context], self.shape, self.dtype).kv
            for recipe, times in Counter(self.recipes.values()).items()
        )
        return len(self.recipes) * dense_bytes([context], self.shape) / read

    @property
    def _selects(self) -> bool:
        return self.ratio is not None and any(recipe.selection == "pages" for recipe in self.recipes.values())

    def _meets(self, context: int, scale: float) -> bool:
        """Whether the ratio is met at `context` and just before the next page turns cold, the worst case."""
        assert self.ratio is not None
        recipe = next(iter(self.recipes.values()))
        worst = context + (recipe.sinks + recipe.window - 1 - context) % PAGE_TOKENS
        return all(self.ratio_at(length, scale) >= self.ratio for length in (context, worst))

    @cached_property
    def holds_from(self) -> int:
        """The context from which on the ratio is met. 1 where no ratio is requested."""
        if not self._selects:
            return 1
        if self.fixed:
            return self.context
        low, high = 0, PAGE_TOKENS
        while not self._meets(high, _LEAST_SCALE) and high < MAX_CONTEXT:
            low, high = high, 2 * high
        while high - low > PAGE_TOKENS:
            middle = (low + high) // 2 // PAGE_TOKENS * PAGE_TOKENS
            low, high = (low, middle) if self._meets(middle, _LEAST_SCALE) else (middle, high)
        return high

    def reading(self, context: int) -> Reading:
        """Return what is read at a context, and the range of contexts for which that holds."""
        if not self._selects:
            return Reading(0, MAX_CONTEXT + 1, 1.0)
        start = self.holds_from
        if context < start:
            return Reading(0, start, None)
        if self.fixed:
            return Reading(start, MAX_CONTEXT + 1, 1.0)
        until = context + max(PAGE_TOKENS, context // GROWTH)
        if self.context == context:
            return Reading(context, until, 1.0)
        return Reading(context, until, self._scale(context))

    def _scale(self, context: int) -> float | None:
        """Return the largest factor on the shares at which the ratio is met. None: everything can be read."""
        assert self.ratio is not None
        most = 1 / min(min(recipe.fractions) for recipe in self.recipes.values() if recipe.fractions)
        if self._meets(context, most):
            return None
        low, high = math.log(_LEAST_SCALE), math.log(most)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._meets(context, math.exp(middle)) else (low, middle)
        return math.exp(low)

    def recipe_at(self, layer: int, context: int) -> Recipe:
        """Return the recipe that a layer's decode uses at a context."""
        recipe = self.recipes[layer]
        return scaled(recipe, self.reading(context).scale)

    def whole(self) -> bool:
        """Whether every layer stores and reads everything in the model's own dtype."""
        return all(recipe == DENSE for recipe in self.recipes.values())
