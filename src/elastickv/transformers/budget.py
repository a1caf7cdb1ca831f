"""The share of its pages that each layer may read at the present context.

`compress=C` allows at most 1/C of the dense bytes. Formats are fixed with the prompt. The share of pages follows the context:
it is solved again whenever the context has grown by an eighth, and the recipes fix the proportions among layers and heads.
Below the context at which one page a head meets the budget, everything is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from elastickv.kvcache.page_counts import selected_pages, whole_sectors
from elastickv.recipe import DENSE, FORMATS, PAGE_TOKENS, AttentionShape, Recipe, interval_bytes
from elastickv.recipe.byte_counts import LIST_ENTRY_BYTES, dense_bytes, selected_page_bytes
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
    return replace(recipe, fractions=tuple(_scaled_shares(np.array(recipe.fractions), scale).tolist()))


def _scaled_shares(shares: NDArray[np.float64], scale: float | None) -> NDArray[np.float64]:
    """Return `scale` times some shares, rounded down to few digits. None: all pages."""
    if scale is None:
        return np.ones_like(shares)
    if scale == 1:
        return shares
    return np.clip(np.floor(shares * scale * _DIGITS) / _DIGITS, _LEAST_SCALE, 1)


@dataclass(frozen=True)
class _ContextReads:
    """Bytes of a step of all layers at some contexts, averaged over an anchor interval.

    Attributes
    ----------
    unscaled : (contexts,) bytes that do not depend on the shares.
    shares : (parts,) of the pages that heads of one part read.
    pages : (contexts, parts) pages that were cold at the anchor.
    times : (contexts, parts) heads of a part, times its share of the steps of an interval.
    page_bytes : (parts,) of a page.
    """

    unscaled: NDArray[np.float64]
    shares: NDArray[np.float64]
    pages: NDArray[np.int64]
    times: NDArray[np.float64]
    page_bytes: NDArray[np.int64]

    def n_bytes(self, scale: float | None) -> NDArray[np.float64]:
        """Return the bytes with all shares times `scale`, (contexts,)."""
        shares = _scaled_shares(self.shares, scale)
        listed = selected_pages(shares, self.pages)
        of_lists = listed * self.page_bytes + whole_sectors(listed * LIST_ENTRY_BYTES)
        return np.asarray(self.unscaled + (of_lists * self.times).sum(axis=1))


class _LayerReads:
    """The sum of `interval_bytes` over layers, for many factors on their shares.

    Parameters
    ----------
    recipes : one for each layer.
    shape : of a layer, for one sequence.
    dtype : the model's own.
    """

    def __init__(self, recipes: Iterable[Recipe], shape: AttentionShape, dtype: str) -> None:
        self._shape, self._dtype = shape, dtype
        self._unselected, heads = Counter[Recipe](), Counter[tuple[int, int, float]]()
        kinds = dict[tuple[int, ...], int]()  # sizes of recipes that differ by their shares alone -> their number
        for recipe, layers in Counter(recipes).items():
            if recipe.selection != "pages":
                self._unselected[recipe] += layers
                continue
            kind = kinds.setdefault(self._sizes(recipe), len(kinds))
            # The pages that were cold at the anchor are those of now, or so many fewer.
            for fewer in range(1 + -(-(recipe.anchor_every - 1) // PAGE_TOKENS)):
                for fraction, alike in Counter(map(recipe.fraction, range(shape.kv_heads))).items():
                    heads[kind, fewer, fraction] += layers * alike
        sizes = np.array([*kinds], np.int64).reshape(-1, 5)
        self._every, self._exact_tokens, self._page_bytes, self._scoring_bytes, self._row_bytes = sizes.T
        parts = np.array([*heads], np.float64).reshape(-1, 3)
        self._kind, self._fewer = parts[:, :2].astype(np.int64).T
        self._shares, self._heads = parts[:, 2], np.array([*heads.values()], np.int64)
        of_now = self._fewer == 0
        self._kind_heads = np.bincount(self._kind[of_now], self._heads[of_now], len(kinds))

    def _sizes(self, recipe: Recipe) -> tuple[int, ...]:
        head_dim, key = self._shape.head_dim, FORMATS[str(recipe.key_format)]
        row = FORMATS[recipe.exact_dtype(self._dtype)].row_bytes(head_dim)
        scoring = key.key_scales(head_dim).bytes_of(PAGE_TOKENS)
        return recipe.anchor_every, recipe.sinks + recipe.window, selected_page_bytes(recipe, head_dim), scoring, row

    def at(self, contexts: Sequence[int]) -> _ContextReads:
        """Return what is read at some contexts, without shares that are scaled."""
        tokens, kind = np.array(contexts, np.int64)[:, None], self._kind
        full, begun = np.divmod(tokens - self._exact_tokens, PAGE_TOKENS)
        cold = np.maximum(full, 0)
        pages = np.maximum(full[:, kind] - self._fewer, 0)
        last = begun[:, kind] + 1 + PAGE_TOKENS * self._fewer  # step since the anchor with so many pages, and the next one
        steps = np.minimum(last, self._every[kind]) - np.maximum(last - PAGE_TOKENS, 0)
        times = self._heads * np.maximum(steps, 0) / self._every[kind]
        exact = 2 * whole_sectors((tokens - PAGE_TOKENS * cold) * self._row_bytes)
        unscaled = ((exact + whole_sectors(cold * self._scoring_bytes) / self._every) * self._kind_heads).sum(axis=1)
        unscaled += ((cold[:, kind] - pages) * self._page_bytes[kind] * times).sum(axis=1)
        for recipe, layers in self._unselected.items():
            unscaled += [layers * interval_bytes(recipe, [each], self._shape, self._dtype).kv for each in contexts]
        return _ContextReads(unscaled, self._shares, pages, times, self._page_bytes[kind])


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
        return len(self.recipes) * dense_bytes([context], self.shape) / float(self._reads.at([context]).n_bytes(scale)[0])

    @cached_property
    def _reads(self) -> _LayerReads:
        return _LayerReads(self.recipes.values(), self.shape, self.dtype)

    @property
    def _selects(self) -> bool:
        return self.ratio is not None and any(recipe.selection == "pages" for recipe in self.recipes.values())

    def _meeting(self, context: int) -> Callable[[float], bool]:
        """Return whether a scale meets the ratio at `context` and just before the next page turns cold, the worst case."""
        ratio, recipe = self.ratio or 1.0, next(iter(self.recipes.values()))
        contexts = [context, context + (recipe.sinks + recipe.window - 1 - context) % PAGE_TOKENS]
        dense, reads = len(self.recipes) * dense_bytes([1], self.shape) * np.array(contexts), self._reads.at(contexts)
        return lambda scale: bool((dense / reads.n_bytes(scale) >= ratio).all())

    @cached_property
    def holds_from(self) -> int:
        """The context from which on the ratio is met. 1 where no ratio is requested."""
        if not self._selects:
            return 1
        if self.fixed:
            return self.context
        low, high = 0, PAGE_TOKENS
        while not self._meeting(high)(_LEAST_SCALE) and high < MAX_CONTEXT:
            low, high = high, 2 * high
        while high - low > PAGE_TOKENS:
            middle = (low + high) // 2 // PAGE_TOKENS * PAGE_TOKENS
            low, high = (low, middle) if self._meeting(middle)(_LEAST_SCALE) else (middle, high)
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
        most = 1 / min(min(recipe.fractions) for recipe in self.recipes.values() if recipe.fractions)
        meets = self._meeting(context)
        if meets(most):
            return None
        low, high = math.log(_LEAST_SCALE), math.log(most)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if meets(math.exp(middle)) else (low, middle)
        return math.exp(low)

    def recipe_at(self, layer: int, context: int) -> Recipe:
        """Return the recipe that a layer's decode uses at a context."""
        recipe = self.recipes[layer]
        return scaled(recipe, self.reading(context).scale)

    def whole(self) -> bool:
        """Whether every layer stores and reads everything in the model's own dtype."""
        return all(recipe == DENSE for recipe in self.recipes.values())
