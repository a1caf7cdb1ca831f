"""Replay of captured attention inputs in NumPy: any stored keys and values, any lists of pages, against dense attention.

One (layer, KV head) at a time, all of its queries at once in float32; the regions, the ages of pages and the anchors are those
that decoding token by token would have, as the reference cache has them.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from elastickv.kvcache.error_metrics import relative_l2
from elastickv.kvcache.rounding import rounded
from elastickv.recipe import PAGE_TOKENS, regions

Float32 = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Head:
    """One KV head of one layer, and the query heads that share it.

    Attributes
    ----------
    q : (group, queries, head_dim), the last `queries` positions.
    k, v : (tokens, head_dim).
    sinks, window : exact tokens at the start and at the end.
    dtype : 16-bit dtype of the window.
    """

    q: Float32
    k: Float32
    v: Float32
    sinks: int = 4
    window: int = 128
    dtype: str = "bf16"

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(queries,) tokens that each query sees."""
        tokens, queries = len(self.k), self.q.shape[1]
        return np.arange(tokens - queries + 1, tokens + 1)

    @cached_property
    def cold_pages(self) -> NDArray[np.int64]:
        """(queries,) cold pages at each query."""
        return np.array([regions(int(n), self.sinks, self.window).cold // PAGE_TOKENS for n in self.lengths])

    @cached_property
    def pages(self) -> tuple[Float32, Float32]:
        """Keys and values of every page cold at the last query, (pages, 32, head_dim), rounded to the window's dtype."""
        cold = slice(self.sinks, self.sinks + int(self.cold_pages[-1]) * PAGE_TOKENS)
        head_dim = self.k.shape[1]
        keys, values = (rounded(x[cold], self.dtype).reshape(-1, PAGE_TOKENS, head_dim) for x in (self.k, self.v))
        return keys, values

    @cached_property
    def dense(self) -> Float32:
        """(group, queries, head_dim): attention over everything, unrounded."""
        allowed = np.arange(len(self.k))[None] < self.lengths[:, None]
        return _attend(self.q, self.k, self.v, allowed)

    @cached_property
    def _exact(self) -> tuple[Float32, Float32, Bools]:
        """Keys, values and (queries, tokens) mask of what some query reads from sinks and window."""
        first = self.sinks + int(self.cold_pages[0]) * PAGE_TOKENS
        positions = np.r_[0 : self.sinks, first : len(self.k)]
        boundary = self.sinks + self.cold_pages * PAGE_TOKENS
        allowed = (positions < self.sinks) | (positions >= boundary[:, None])
        allowed &= positions < self.lengths[:, None]
        return rounded(self.k[positions], self.dtype), rounded(self.v[positions], self.dtype), allowed

    @cached_property
    def all_pages(self) -> Bools:
        """(queries, pages): the cold pages of each query."""
        return np.arange(len(self.pages[0])) < self.cold_pages[:, None]

    @cached_property
    def exact_lse(self) -> Float32:
        """(group, queries) log-sum-exp over sinks and window."""
        keys, _, allowed = self._exact
        scores = np.where(allowed, self.q @ keys.T / np.sqrt(np.float32(self.k.shape[1])), -np.inf)
        top = scores.max(-1, keepdims=True)
        return (top + np.log(np.exp(scores - top).sum(-1, keepdims=True)))[..., 0]

    def output(self, keys: Float32, values: Float32, read: Bools | None = None) -> Float32:
        """Return (group, queries, head_dim) with cold pages as stored.

        Parameters
        ----------
        keys, values : (pages, 32, head_dim), dequantized.
        read : (queries, pages) which are read, or (queries, pages x n) which n-ths of pages; all cold ones when None.
        """
        read = self.all_pages if read is None else read
        keys, values = keys.reshape(-1, self.k.shape[1]), values.reshape(-1, self.k.shape[1])
        cold = np.repeat(read, len(keys) // read.shape[1], axis=1)
        exact_keys, exact_values, exact = self._exact
        return _attend(
            self.q,
            np.concatenate([keys, exact_keys]),
            np.concatenate([values, exact_values]),
            np.concatenate([cold, exact], axis=1),
        )

    def errors(self, output: Float32) -> Float32:
        """Return (group, queries) relative L2 errors of an output."""
        return relative_l2(output, self.dense).astype(np.float32)


def _attend(q: Float32, keys: Float32, values: Float32, allowed: Bools) -> Float32:
    keys, values = keys.astype(np.float32), values.astype(np.float32)
    outputs = []
    for rows in q:
        scores = rows @ keys.T / np.sqrt(np.float32(q.shape[-1]))
        scores[~allowed] = -np.inf
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        outputs.append(scores @ values / scores.sum(axis=1, keepdims=True))
    return np.array(outputs)


def listed(head: Head, scores: Float32, counts: NDArray[np.int64], anchor_every: int, halves: int = 1) -> Bools:
    """Return (queries, pages) which pages each query reads: the best at the last anchor, and those that turned cold since.

    Parameters
    ----------
    scores : (queries, pages), of each query; those of anchors count.
    counts : (queries,) pages to select at each query.
    halves : parts of a page that are selected by themselves.
    """
    read = np.zeros(scores.shape, bool)
    numbers = np.arange(scores.shape[1])
    for anchor in range(0, len(scores), anchor_every):
        cold = int(head.cold_pages[anchor]) * halves
        best = np.argsort(-scores[anchor, :cold], kind="stable")[: counts[anchor]]
        rows = slice(anchor, anchor + anchor_every)
        read[rows, best] = True
        read[rows] |= (numbers >= cold) & (numbers < halves * head.cold_pages[rows, None])
    return read
