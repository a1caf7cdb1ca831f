"""The bytes that decodes read of an engine's caches, from positions alone: nothing is asked of the device.

A token at position p attends to p + 1 tokens. It reads the newest `window` of them from its window and each older one from its
page, whole pages. Where a layer selects pages it reads those on its list and those that have left the window since the list
was made; at an anchor also the scales and zeros of all keys, by which pages are ranked. Every contiguous range of memory is
counted in DRAM sectors of 32 bytes, as `recipe.byte_counts` does.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from elastickv.recipe import FORMATS, PAGE_TOKENS, AttentionShape, Recipe
from elastickv.recipe.byte_counts import LIST_ENTRY_BYTES
from elastickv.recipe.formats import DENSE_BYTES_PER_ELEMENT, SECTOR_BYTES, sectors
from elastickv.recipe.slab import Slab
from elastickv.vllm.serving_options import KEY

Int64Array = NDArray[np.int64]
RATIOS = 32
"""Ratios of single requests whose tables are remembered."""


@dataclass(frozen=True)
class ReadTotals:
    """What decodes read, all layers and KV heads of the model together.

    Attributes
    ----------
    read_bytes : bytes of pages, lists, scales that rank pages, and windows.
    dense_bytes : bytes that a dense 16-bit cache would read for the same tokens.
    steps : steps of the engine with decodes.
    tokens : query tokens of decodes.
    layer_tokens : the same, counted in each layer.
    anchors : those of `layer_tokens` at which a layer lists its pages anew.
    """

    read_bytes: int = 0
    dense_bytes: int = 0
    steps: int = 0
    tokens: int = 0
    layer_tokens: int = 0
    anchors: int = 0

    def __add__(self, other: "ReadTotals") -> "ReadTotals":
        return ReadTotals(*(mine + others for mine, others in zip(vars(self).values(), vars(other).values(), strict=True)))


COUNTERS = {
    "read_bytes": (
        f"vllm:{KEY}_kv_read_bytes_total",
        "Bytes of KV cache that decodes read, in all layers of ElasticKV and on all ranks together.",
    ),
    "dense_bytes": (
        f"vllm:{KEY}_kv_dense_bytes_total",
        "Bytes that a dense 16-bit KV cache would read for the same decodes.",
    ),
    "steps": (f"vllm:{KEY}_decode_steps_total", "Engine steps with decodes."),
    "tokens": (f"vllm:{KEY}_decode_tokens_total", "Query tokens of decodes, with drafts."),
    "layer_tokens": (f"vllm:{KEY}_layer_tokens_total", "Query tokens of decodes, counted in each layer of ElasticKV."),
    "anchors": (
        f"vllm:{KEY}_anchors_total",
        "Query tokens of decodes at which a layer lists its pages anew, counted in each layer.",
    ),
}
"""Attribute of `ReadTotals` -> the name of its counter and what it counts."""


@dataclass(frozen=True)
class _Anchors:
    """What selection saves and costs in layers that have their anchors at the same tokens.

    Attributes
    ----------
    every, offset : (groups,) of the layers of each group.
    saved : (groups, pages + 1) bytes of the pages that lists of so many leave out, less the bytes of the lists.
    scoring : (groups, pages + 1) bytes that ranking so many pages reads.
    layers : (groups, pages + 1) layers that select among so many pages.
    """

    every: Int64Array
    offset: Int64Array
    saved: Int64Array
    scoring: Int64Array
    layers: Int64Array


class DecodeReads:
    """Bytes that tokens of decodes read in the layers that ElasticKV serves.

    Parameters
    ----------
    recipes : layer -> recipe; all have one window and no sinks.
    shape : of a layer, all heads and not a rank's share.
    dtype : the model's, in which the window is stored.
    layer_count : layers of the model, over which anchors are spread.
    longest : most tokens of a request.
    recipes_of_ratio : returns the recipes of the same layers for a request's own ratio.
    """

    def __init__(
        self,
        recipes: Mapping[int, Recipe],
        shape: AttentionShape,
        dtype: str,
        layer_count: int,
        longest: int,
        recipes_of_ratio: Callable[[float], Mapping[int, Recipe]],
    ) -> None:
        (self._window,) = {recipe.window for recipe in recipes.values()}
        self._shape, self._layers, self._layer_count = shape, len(recipes), layer_count
        self._most_pages = -(-longest // PAGE_TOKENS)
        rows = 2 * shape.kv_heads * len(recipes)  # of K and V
        self._dense_row_bytes = rows * shape.head_dim * DENSE_BYTES_PER_ELEMENT
        self._exact_row_bytes = rows * FORMATS[dtype].row_bytes(shape.head_dim)
        self._page_bytes = shape.kv_heads * sum(map(self._slab_bytes, recipes.values()))
        self._usual = self._anchors(recipes)
        self._of_ratio = lru_cache(RATIOS)(lambda ratio: self._anchors(recipes_of_ratio(ratio)))

    def totals(self, positions: Int64Array, prompts: Int64Array, since: Int64Array, ratio: float | None = None) -> ReadTotals:
        """Return what tokens read that requests have generated, without `steps`.

        Parameters
        ----------
        positions : (tokens,) in their requests.
        prompts : (tokens,) lengths of the prompts, at most the positions.
        since : (tokens,) the first token of the request that was computed since it got its blocks. A list of an anchor before
            it is taken to be gone, so that every page is read.
        ratio : the requests' own; None: the server's.
        """
        exact = np.minimum(positions + 1, self._window)
        pages = -(-(positions + 1 - exact) // PAGE_TOKENS)
        read = self._exact_row_bytes * int(exact.sum()) + self._page_bytes * int(pages.sum())
        anchors, groups = 0, self._selection(ratio)
        if groups is not None:
            own = (positions - prompts)[:, None]
            age = np.minimum(own, (own + groups.offset) % groups.every)  # `Recipe.steps_since_refresh`
            anchor = positions[:, None] - age
            at = np.arange(len(groups.every)), np.maximum(anchor + 1 - self._window, 0) // PAGE_TOKENS
            present = anchor >= since[:, None]
            at_anchor = present & (age == 0)
            read -= int((groups.saved[at] * present).sum())
            read += int((groups.scoring[at] * at_anchor).sum())
            anchors = int((groups.layers[at] * at_anchor).sum())
        return ReadTotals(
            read_bytes=read,
            dense_bytes=self._dense_row_bytes * int((positions + 1).sum()),
            tokens=len(positions),
            layer_tokens=len(positions) * self._layers,
            anchors=anchors,
        )

    def _selection(self, ratio: float | None) -> _Anchors | None:
        """Return the tables of a ratio; None where every page is read."""
        if ratio is None or self._usual is None:
            return self._usual
        return None if ratio == 1 else self._of_ratio(ratio)

    def _anchors(self, recipes: Mapping[int, Recipe]) -> _Anchors | None:
        groups = defaultdict[tuple[int, int], list[Recipe]](list)
        for layer, recipe in recipes.items():
            if recipe.selection == "pages":
                groups[recipe.anchor_every, recipe.layer_anchor_offset(layer, self._layer_count)].append(recipe)
        if not groups:
            return None
        tables = [np.sum([self._of_layer(recipe) for recipe in alike], axis=0) for alike in groups.values()]
        saved, scoring, layers = np.stack(tables, axis=1)
        every, offset = np.array(list(groups), np.int64).T
        return _Anchors(every, offset, saved, scoring, layers)

    def _of_layer(self, recipe: Recipe) -> Int64Array:
        """Return the rows of `_Anchors` for one layer, (3, pages + 1)."""
        assert recipe.key_format is not None, "it selects by the scales of its keys"
        pages, heads = np.arange(self._most_pages + 1), self._shape.kv_heads
        fractions = np.array([recipe.fraction(head) for head in range(heads)])[:, None]
        listed = np.minimum(np.maximum((fractions * pages).astype(np.int64), 1), pages)  # as `regions.selected` counts them
        selects = (listed < pages).any(axis=0)
        scales = FORMATS[recipe.key_format].key_scales(self._shape.head_dim).bytes_of(PAGE_TOKENS)
        lists = -(-listed * LIST_ENTRY_BYTES // SECTOR_BYTES) * SECTOR_BYTES
        saved = (self._slab_bytes(recipe) * (pages - listed) - lists).sum(axis=0)
        return np.stack([saved, heads * sectors(scales) * pages, np.ones_like(pages)]) * selects

    def _slab_bytes(self, recipe: Recipe) -> int:
        return sectors(Slab.of(recipe, self._shape.head_dim).n_bytes)
