"""Decode attention in float64 NumPy. A partial result is always (output, log-sum-exp)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Partial:
    """Softmax attention over some of the keys.

    Attributes
    ----------
    output : (queries, head_dim) float64, normalized over these keys.
    lse : (queries,) float64, log of the sum of exponentials; -inf over no keys.
    """

    output: Float64
    lse: Float64

    def weighted(self, log_weight: float) -> "Partial":
        """Return the same output with `log_weight` added to its log-sum-exp."""
        return Partial(self.output, self.lse + log_weight)


@np.errstate(invalid="ignore", over="ignore")
def attend(queries: ArrayLike, keys: ArrayLike, values: ArrayLike) -> Partial:
    """Return softmax(q k^T / sqrt(head_dim)) v; numbers that are not finite become NaN in the outputs, without a warning.

    Parameters
    ----------
    queries : (queries, head_dim).
    keys, values : (tokens, head_dim); no tokens give an output of zero with a log-sum-exp of -inf.
    """
    q, k, v = (np.asarray(a, dtype=np.float64) for a in (queries, keys, values))
    if not len(k):
        return Partial(np.zeros_like(q), np.full(len(q), -np.inf))
    scores = q @ k.T / np.sqrt(q.shape[-1])
    top = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=1, keepdims=True)
    return Partial(weights @ v / total, (top + np.log(total))[:, 0])


@np.errstate(invalid="ignore", over="ignore")
def merge(*partials: Partial) -> Partial:
    """Return the attention over the union of the keys of `partials`.

    The log-sum-exp merge of FlashDecoding (Dao et al. 2023): exact, in any order.
    """
    lses = np.stack([p.lse for p in partials])
    total = np.logaddexp.reduce(lses, axis=0)
    finite = np.where(np.isneginf(total), 0.0, total)
    weights = np.exp(lses - finite)
    output = np.einsum("pq,pqd->qd", weights, np.stack([p.output for p in partials]))
    return Partial(output, total)
