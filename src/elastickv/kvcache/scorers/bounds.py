"""The scorer of pages: an upper bound of q.k over the middle half of what a page's scales span, summed over the query heads.

After Quest (Tang et al. 2024), whose per-channel minima and maxima are here those of the quantiser: zero and zero + 15 scale.
The bound over the whole range is reached by no key once there are many channels; over its middle half it ranks pages better
(benchmarks/NOTES.md). A sum over heads is linear in what each head contributes, so a page costs one product of length
2 head_dim whatever the group, and no page's score depends on the others'.
To try another scorer, write another file with these functions and call it where this one is called: the reference cache, the
CPU's `selection.py` and the CUDA kernel `select.cu`.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elastickv.kvcache.attention import Float64

LEVELS = 15
SPAN = 0.5


@np.errstate(invalid="ignore")  # bounds of pages with infinities are NaN, of which a cache tells
def page_bounds(queries: ArrayLike, scales: ArrayLike, zeros: ArrayLike, span: float = SPAN) -> Float64:
    """Return (queries, pages) upper bounds of q.k / sqrt(head_dim) over the middle `span` of every channel's range.

    The sum over channels of max(q * low, q * high), with low and high = zero + 15 scale (1 -+ span) / 2, is
    q . zero + 7.5 (q + span |q|) . scale.

    Parameters
    ----------
    queries : (queries, head_dim).
    scales, zeros : (pages, head_dim), scales not negative.
    span : share of the range; with 1 no key of the page is above the bound.
    """
    q, s, z = (np.asarray(a, np.float64) for a in (queries, scales, zeros))
    return np.asarray((q @ z.T + LEVELS / 2 * ((q + span * np.abs(q)) @ s.T)) / np.sqrt(q.shape[-1]))


def score_pages(bounds: Float64) -> Float64:
    """Return one score a page from the (queries, pages) bounds of the query heads that share it: their sum."""
    return np.asarray(bounds.sum(axis=0))


def select_pages(scores: Float64, count: int) -> NDArray[np.int64]:
    """Return the numbers of the `count` pages of highest score, ascending; of equals the first."""
    best = np.argsort(-scores, kind="stable")[:count]
    return np.sort(best).astype(np.int64)
