"""The float64 reference of a backend: the same recipe on the same codes."""

import math

import numpy as np
from numpy.typing import NDArray

from elastickv.kvcache.attention import Float64, Partial, attend, merge
from elastickv.kvcache.protocol import LayerCache, StoredHead
from elastickv.kvcache.tensor_view import Float32
from elastickv.recipe.regions import PAGE_TOKENS, regions, retained_tokens


class Oracle:
    """Decode in float64 from what a cache has stored.

    The oracle has its own reused outputs, so it must run at every anchor step of a `reuse` recipe. The pages that a selection
    reads are the cache's, as of its last decode.
    """

    def __init__(self, cache: LayerCache) -> None:
        self._cache = cache
        self._reused: dict[tuple[int, int], Partial] = {}
        self._marked: dict[tuple[int, int], Partial] = {}

    def mark(self) -> None:
        """Remember the reused outputs, when the cache is marked."""
        self._marked = dict(self._reused)

    def rewind(self) -> None:
        """Return to the reused outputs as marked, when the cache is rewound."""
        self._reused = dict(self._marked)

    def take_rows(self, other: "Oracle", rows: NDArray[np.int64]) -> None:
        """Take over the reused outputs of `other`: those of its row `rows[i]` for row i."""
        heads = range(self._cache.shape.kv_heads)
        reused = {(i, h): other._reused.get((r, h)) for i, r in enumerate(rows.tolist()) for h in heads}
        self._reused = {row_head: partial for row_head, partial in reused.items() if partial is not None}

    def decode(self, queries: Float32) -> tuple[Float64, Float64]:
        """Return outputs and log-sum-exps as `LayerCache.decode` does, in float64."""
        shape = self._cache.shape
        outputs = np.empty((shape.batch, shape.query_heads, shape.head_dim))
        lse = np.empty((shape.batch, shape.query_heads))
        for row in range(shape.batch):
            for head in range(shape.kv_heads):
                group = slice(head * shape.group, (head + 1) * shape.group)
                partial = self.decode_head(row, head, queries[row, group])
                outputs[row, group], lse[row, group] = partial.output, partial.lse
        return outputs, lse

    def decode_head(self, row: int, head: int, queries: Float32) -> Partial:
        """Return the attention of (group, head_dim) `queries` over one KV head of one sequence."""
        cache, recipe = self._cache, self._cache.recipe
        stored = cache.stored(row, head)
        length, steps_since_refresh = int(cache.lengths[row]), recipe.steps_since_refresh(cache.step, cache.anchor_offset)
        exact = attend(queries, stored.exact_keys, stored.exact_values)
        pages = cache.pages_read(row, head)
        if pages is not None:
            tokens = (pages[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)).ravel()
            return merge(attend(queries, stored.cold_keys[tokens], stored.cold_values[tokens]), exact)
        if recipe.selection != "reuse":
            return merge(self._cold(stored, queries, 0, length), exact)
        if steps_since_refresh == 0:
            self._reused[row, head] = self._cold(stored, queries, 0, length)
        reused = self._reused[row, head].weighted(recipe.cached_log_weight(steps_since_refresh))
        at_anchor = regions(length - steps_since_refresh, recipe.sinks, recipe.window).cold
        return merge(reused, self._cold(stored, queries, at_anchor, length), exact)

    def _cold(self, stored: StoredHead, queries: Float32, start: int, length: int) -> Partial:
        recipe = self._cache.recipe
        partial = attend(queries, stored.cold_keys[start:], stored.cold_values[start:])
        cold = regions(length, recipe.sinks, recipe.window).cold
        if recipe.selection != "stride" or not cold:
            return partial
        # Each retained token stands for cold / retained of them: it has the mass of the dropped ones too.
        return partial.weighted(math.log(cold / retained_tokens(cold, recipe.stride)))
