"""The bytes that decodes read of an engine's caches, from positions alone: nothing is asked of the device.

A token at position p attends to p + 1 tokens. It reads the newest `window` of them from its window and each older one from its
page, whole pages. Where a layer selects pages it reads those on its list and those that have left the window since the list
was made; at an anchor also the scales and zeros of all keys, by which pages are ranked. Every contiguous range of memory is
counted in DRAM sectors of 32 bytes, as `recipe.byte_counts` does, and an element of a window as 2 bytes, as it and the dense
cache that reads are compared with do: in a float32 model both have 4.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastickv.kvcache.page_counts import selected_pages, whole_sectors
from elastickv.recipe import FORMATS, PAGE_TOKENS, AttentionShape, Recipe
from elastickv.recipe.byte_counts import LIST_ENTRY_BYTES
from elastickv.recipe.formats import DENSE_BYTES_PER_ELEMENT, sectors
from elastickv.recipe.slab import Slab
from elastickv.vllm.selection.ratio_shares import Shares, layer_shares
from elastickv.vllm.serving_options import KEY

Int64Array = NDArray[np.int64]
SERVERS_RATIO = 0.0
"""Stands for the server's ratio where a request has none of its own."""
_TOKENS_AT_ONCE = 256  # to bound the memory that they take


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
class _SelectingLayers:
    """The layers that select pages.

    Attributes
    ----------
    rows : (layers,) their indices among the layers that ElasticKV serves.
    every, offset : (groups,) of layers that have their anchors at the same tokens.
    group : (layers,) the group of each layer.
    page_bytes : (layers,) of a page of one KV head.
    scoring_bytes : (layers,) that ranking a page reads, for all KV heads.
    """

    rows: Int64Array
    every: Int64Array
    offset: Int64Array
    group: Int64Array
    page_bytes: Int64Array
    scoring_bytes: Int64Array

    def reads(self, pages: Int64Array, shares: Shares) -> Int64Array:
        """Return the bytes that lists save, those that ranking reads, and whether there are lists, (3, tokens, layers).

        Parameters
        ----------
        pages : (tokens, layers) pages that had left the window at the anchor.
        shares : (layers, kv_heads) of them that are listed, or (tokens, layers, kv_heads).
        """
        all_pages = pages[:, :, None]
        listed = selected_pages(shares, all_pages)
        saved = (self.page_bytes[:, None] * (all_pages - listed) - whole_sectors(listed * LIST_ENTRY_BYTES)).sum(axis=2)
        selects = (listed < all_pages).any(axis=2)
        return np.stack([saved, self.scoring_bytes * pages, np.ones_like(pages)]) * selects


class DecodeReads:
    """Bytes that tokens of decodes read in the layers that ElasticKV serves.

    Parameters
    ----------
    recipes : layer -> recipe; all have one window and no sinks.
    shape : of a layer, all heads and not a rank's share.
    layer_count : layers of the model, over which anchors are spread.
    longest : most tokens of a request.
    shares_of_ratio : returns the shares of the pages of the same layers for a request's own ratio, (layers, kv_heads).
    """

    def __init__(
        self,
        recipes: Mapping[int, Recipe],
        shape: AttentionShape,
        layer_count: int,
        longest: int,
        shares_of_ratio: Callable[[float], Shares],
    ) -> None:
        (self._window,) = {recipe.window for recipe in recipes.values()}
        self._shape, self._layers, self._shares_of_ratio = shape, len(recipes), shares_of_ratio
        rows = 2 * shape.kv_heads * len(recipes)  # of K and V
        self._row_bytes = rows * shape.head_dim * DENSE_BYTES_PER_ELEMENT  # of a window, or of a dense cache
        self._page_bytes = shape.kv_heads * sum(map(self._slab_bytes, recipes.values()))
        self._selecting = self._selecting_layers(recipes, layer_count)
        if self._selecting is not None:
            self._usual = self._table(self._selecting, layer_shares(recipes, shape.kv_heads), -(-longest // PAGE_TOKENS))

    def totals(self, positions: Int64Array, prompts: Int64Array, since: Int64Array, ratios: Shares) -> ReadTotals:
        """Return what tokens read that requests have generated, without `steps`.

        Parameters
        ----------
        positions : (tokens,) in their requests.
        prompts : (tokens,) lengths of the prompts, at most the positions.
        since : (tokens,) the first token of the request that was computed since it got its blocks. A list of an anchor before
            it is taken to be gone, so that every page is read.
        ratios : (tokens,) the requests' own; `SERVERS_RATIO` where they have none.
        """
        exact = np.minimum(positions + 1, self._window)
        pages = -(-(positions + 1 - exact) // PAGE_TOKENS)
        read = self._row_bytes * int(exact.sum()) + self._page_bytes * int(pages.sum())
        anchors = 0
        if self._selecting is not None:
            saved, scoring, anchors = self._selected(self._selecting, positions, prompts, since, ratios)
            read += scoring - saved
        return ReadTotals(
            read_bytes=read,
            dense_bytes=self._row_bytes * int((positions + 1).sum()),
            tokens=len(positions),
            layer_tokens=len(positions) * self._layers,
            anchors=anchors,
        )

    def _selected(
        self, layers: _SelectingLayers, positions: Int64Array, prompts: Int64Array, since: Int64Array, ratios: Shares
    ) -> tuple[int, int, int]:
        """Return the bytes that lists save, those that ranking reads, and the anchors."""
        own = (positions - prompts)[:, None]
        age = np.minimum(own, (own + layers.offset) % layers.every)  # `Recipe.steps_since_refresh`
        anchor = positions[:, None] - age
        pages = np.maximum(anchor + 1 - self._window, 0) // PAGE_TOKENS
        counted = anchor >= since[:, None]
        at_anchor = counted & (age == 0)
        usual = np.flatnonzero(ratios == SERVERS_RATIO)
        of_groups = self._usual[:, pages[usual], np.arange(len(layers.every))]
        sums = _summed(of_groups, counted[usual], at_anchor[usual])
        others = np.flatnonzero((ratios != SERVERS_RATIO) & (ratios != 1))  # with 1 every page is read
        for first in range(0, len(others), _TOKENS_AT_ONCE):
            some = others[first : first + _TOKENS_AT_ONCE]
            distinct, number = np.unique(ratios[some], return_inverse=True)
            shares = np.stack([self._shares_of_ratio(ratio)[layers.rows] for ratio in distinct.tolist()])[number]
            of_layers = layers.reads(pages[some][:, layers.group], shares)
            sums += _summed(of_layers, counted[some][:, layers.group], at_anchor[some][:, layers.group])
        saved, scoring, anchors = sums.tolist()
        return saved, scoring, anchors

    def _selecting_layers(self, recipes: Mapping[int, Recipe], layer_count: int) -> _SelectingLayers | None:
        chosen = [(row, layer, recipe) for row, (layer, recipe) in enumerate(recipes.items()) if recipe.selection == "pages"]
        if not chosen:
            return None
        anchors = [(recipe.anchor_every, recipe.layer_anchor_offset(layer, layer_count)) for _, layer, recipe in chosen]
        groups = list(dict.fromkeys(anchors))
        every, offset = np.array(groups, np.int64).T
        scales = [FORMATS[str(recipe.key_format)].key_scales(self._shape.head_dim) for _, _, recipe in chosen]
        return _SelectingLayers(
            rows=np.array([row for row, _, _ in chosen]),
            every=every,
            offset=offset,
            group=np.array([groups.index(each) for each in anchors]),
            page_bytes=np.array([self._slab_bytes(recipe) for _, _, recipe in chosen]),
            scoring_bytes=self._shape.kv_heads * np.array([sectors(each.bytes_of(PAGE_TOKENS)) for each in scales]),
        )

    def _table(self, layers: _SelectingLayers, shares: Shares, most_pages: int) -> Int64Array:
        """Return `_SelectingLayers.reads` by the number of pages, summed over the layers of a group: (3, pages + 1, groups)."""
        of_group = layers.group[:, None] == np.arange(len(layers.every))
        parts = []
        for first in range(0, most_pages + 1, _TOKENS_AT_ONCE):
            pages = np.arange(first, min(first + _TOKENS_AT_ONCE, most_pages + 1))
            parts.append(layers.reads(np.repeat(pages[:, None], len(layers.group), axis=1), shares[layers.rows]) @ of_group)
        return np.concatenate(parts, axis=1)

    def _slab_bytes(self, recipe: Recipe) -> int:
        return sectors(Slab.of(recipe, self._shape.head_dim).n_bytes)


def _summed(reads: Int64Array, counted: NDArray[np.bool_], at_anchor: NDArray[np.bool_]) -> Int64Array:
    """Return (3,) sums of what lists save where they count, and of what they cost where they are made."""
    saved, scoring, layers = reads
    return np.array([(saved * counted).sum(), (scoring * at_anchor).sum(), (layers * at_anchor).sum()])
