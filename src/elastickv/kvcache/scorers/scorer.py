"""What a page scorer is: the weights that a decode step's queries give to a page's scales and zeros.

A page of K stores a scale and a zero for each channel, so its channel d spans [zero, zero + 15 scale]; of codes with
another largest than 15, `scale_factor` gives the scales of 15 steps. A scorer turns the query heads that share a KV head into
two weights for each channel, and the score of a page is the linear form

    sum over channels of zero_weight * zero + scale_weight * scale.

A page thus costs one product of length 2 head_dim, whatever the number of query heads, and no page's score depends on another
page. The backends compute that product; a scorer only says what the weights are, in one function that the reference cache
calls with arrays and the CPU backend compiles.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elastickv.kvcache.attention import Float64
from elastickv.recipe.formats import FORMATS

ChannelWeights = Callable[[Any], tuple[Any, Any]]
STEPS = 15  # of a channel's range


def scale_factor(key_format: str) -> float:
    """Return what scales of a format are multiplied by so that a channel spans [zero, zero + 15 scale]."""
    return FORMATS[key_format].largest_code / STEPS


@dataclass(frozen=True)
class Scorer:
    """How pages are ranked.

    Attributes
    ----------
    name : the word in recipe texts, 'scorer=NAME'.
    channel_weights : queries -> (zero_weight, scale_weight). It loops over its argument with `for`, one query head at a time,
        and uses +, -, *, /, `abs` and np.float32 constants, so that the same lines work in the reference, on the rows of a
        (query heads, head_dim) array, and on the CPU, compiled, on the float32 numbers of one channel.
    cuda_id : value of the CUDA macro SCORER under which `kernels/score.cuh` has the same function; None: CUDA has none.
    """

    name: str
    channel_weights: ChannelWeights
    cuda_id: int | None = None

    @np.errstate(invalid="ignore")  # infinite scales and zeros make NaN, which a cache reports
    def score(self, queries: ArrayLike, scales: ArrayLike, zeros: ArrayLike) -> Float64:
        """Return the scores of pages in float64.

        Parameters
        ----------
        queries : (query heads, head_dim) of one KV head.
        scales, zeros : (pages, head_dim), scales times their format's `scale_factor`.

        Returns
        -------
        scores : (pages,); only their order matters.
        """
        q, s, z = (np.asarray(a, np.float64) for a in (queries, scales, zeros))
        zero_weights, scale_weights = self.channel_weights(q)
        return np.asarray(z @ zero_weights + s @ scale_weights)


def select_pages(scores: Float64, count: int) -> NDArray[np.int64]:
    """Return the numbers of the `count` pages of highest score, ascending; of equal pages the first."""
    best = np.argsort(-scores, kind="stable")[:count]
    return np.sort(best).astype(np.int64)
