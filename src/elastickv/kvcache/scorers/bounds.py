"""The default scorer: an upper bound of q.k over the middle half of the range of a page's channels, summed over query heads.

After Quest (Tang et al. 2024), whose per-channel minimum and maximum are here those of the quantizer: zero and zero + 15 scale.
No key reaches the bound over the whole range once there are many channels; over the middle half of the range it ranks pages
better (benchmarks/NOTES.md).
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from elastickv.kvcache.attention import Float64
from elastickv.kvcache.quantize import INT4_LEVELS
from elastickv.kvcache.scorers.scorer import Scorer

SPAN = 0.5
HALF_RANGE, MIDDLE = np.float32(INT4_LEVELS / 2), np.float32(SPAN)


@np.errstate(invalid="ignore")  # infinite scales and zeros make NaN, which a cache reports
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
    return np.asarray((q @ z.T + INT4_LEVELS / 2 * ((q + span * np.abs(q)) @ s.T)) / np.sqrt(q.shape[-1]))


def score_pages(bounds: Float64) -> Float64:
    """Return one score for each page from the (queries, pages) bounds of the query heads that share it: their sum."""
    return np.asarray(bounds.sum(axis=0))


def channel_weights(queries: Any) -> tuple[Any, Any]:
    """Return what zeros and scales are multiplied by: `page_bounds` summed over heads, times sqrt(head_dim)."""
    total, size = np.float32(0), np.float32(0)
    for query in queries:
        total, size = total + query, size + abs(query)
    return total, HALF_RANGE * (total + MIDDLE * size)


BOUNDS = Scorer("bounds", channel_weights, cuda_id=0)
