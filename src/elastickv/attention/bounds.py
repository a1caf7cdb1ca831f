"""The scorer of pages: the least upper bound of q.k over what a page's scales span.

After Quest (Tang et al. 2024), whose per-channel minima and maxima are here those of the quantiser: zero and zero + 15 scale.
To try another scorer, write another file with `score_pages` and name it in `SCORER` (and its kernel in the back ends).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elastickv.attention.reference import Float64

LEVELS = 15
SCORER = "bounds"


def page_bounds(queries: ArrayLike, scales: ArrayLike, zeros: ArrayLike) -> Float64:
    """Return (queries, pages) upper bounds of q.k / sqrt(head_dim) over every page.

    The sum over channels of max(q * zero, q * (zero + 15 scale)) is q . zero + 15 max(q, 0) . scale.

    Parameters
    ----------
    queries : (queries, head_dim).
    scales, zeros : (pages, head_dim), scales not negative.
    """
    q, s, z = (np.asarray(a, np.float64) for a in (queries, scales, zeros))
    return np.asarray((q @ z.T + LEVELS * (np.maximum(q, 0) @ s.T)) / np.sqrt(q.shape[-1]))


def score_pages(bounds: Float64) -> Float64:
    """Return one score a page from the (queries, pages) bounds of the query heads that share it.

    Each query head's bounds become a softmax over the pages, so that every head has one vote, and the largest vote counts.
    """
    if not bounds.size:
        return np.zeros(bounds.shape[1])
    top = bounds.max(axis=1, keepdims=True)
    lse = top + np.log(np.exp(bounds - top).sum(axis=1, keepdims=True))
    return np.asarray((bounds - lse).max(axis=0))


def select_pages(scores: Float64, count: int) -> NDArray[np.int64]:
    """Return the numbers of the `count` pages of highest score, ascending; of equals the first."""
    best = np.argsort(-scores, kind="stable")[:count]
    return np.sort(best).astype(np.int64)
