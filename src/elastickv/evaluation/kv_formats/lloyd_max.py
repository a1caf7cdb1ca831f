"""The scalar quantizer of least mean squared error for normal numbers: Lloyd 1982, Max 1960."""

from functools import cache
from math import erf, exp, inf, pi, sqrt

_ITERATIONS = 2000
_TOLERANCE = 1e-12


@cache
def normal_codebook(bits: int) -> tuple[float, ...]:
    """Return the 2^bits centroids for N(0, 1), in order.

    Each is the mean of the numbers that are nearest to it: (pdf(a) - pdf(b)) / (cdf(b) - cdf(a)) between the midpoints a and b.
    """
    levels = 2**bits
    centroids = [-3 + 6 * (i + 0.5) / levels for i in range(levels)]
    for _ in range(_ITERATIONS):
        edges = [-inf, *boundaries(centroids), inf]
        means = [(_pdf(a) - _pdf(b)) / (_cdf(b) - _cdf(a)) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        moved = max(abs(mean - centroid) for mean, centroid in zip(means, centroids, strict=True))
        centroids = means
        if moved < _TOLERANCE:
            break
    return tuple(centroids)


def boundaries(centroids: list[float] | tuple[float, ...]) -> list[float]:
    """Return the midpoints between neighbors: what lies between two of them belongs to one centroid."""
    return [(a + b) / 2 for a, b in zip(centroids[:-1], centroids[1:], strict=True)]


def _pdf(x: float) -> float:
    return exp(-x * x / 2) / sqrt(2 * pi)


def _cdf(x: float) -> float:
    return (1 + erf(x / sqrt(2))) / 2
