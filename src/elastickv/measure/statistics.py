"""Estimates and intervals from paired, possibly autocorrelated samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elastickv.errors import NonFiniteError

Float64 = NDArray[np.float64]
RESAMPLES = 2000
WIDEST = 500.0  # half an interval of a ratio's logarithm: what is wider knows nothing either, and its bounds are numbers
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval.

    Attributes
    ----------
    estimate, low, high : the figure and its bounds.
    level : confidence, such as 0.95.
    samples : pairs that it rests on.
    block_length : samples to a bootstrap block: 1 when they look independent.
    """

    estimate: float
    low: float
    high: float
    level: float
    samples: int
    block_length: int

    @property
    def half_width(self) -> float:
        """Half of the interval, relative to the estimate."""
        return (self.high - self.low) / 2 / self.estimate

    def contains(self, value: float) -> bool:
        """Whether `value` lies inside."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Moments:
    """What a file tells of samples that it does not hold.

    Attributes
    ----------
    mean, std : of the samples that were kept, in one unit.
    samples : samples taken.
    percent : percent of them cut at either end.
    """

    mean: float
    std: float
    samples: int
    percent: float = 0.0

    @property
    def relative_error(self) -> float:
        """Standard error of the truncated mean, relative to it (Tukey & McLaughlin 1963), for normal samples.

        It is the winsorised deviation that counts, and cutting has narrowed the one we know: both follow from the curve.
        """
        share, widened = self.percent / 100, 1.0
        if share:
            normal = NormalDist()
            z = normal.inv_cdf(1 - share)
            kept = 1 - 2 * z * normal.pdf(z) / (1 - 2 * share)
            widened = math.sqrt((1 - 2 * share) + 2 * share * z**2 / kept) / (1 - 2 * share)
        return widened * self.std / self.mean / math.sqrt(self.samples)


def truncated(samples: ArrayLike, percent: float) -> Float64:
    """Return the sorted samples without `percent` % of them at either end."""
    ordered = np.sort(np.asarray(samples, np.float64))
    cut = int(len(ordered) * percent / 100)
    return ordered[cut : len(ordered) - cut]


def ratio_interval(
    numerator: Sequence[float], denominator: Sequence[float], percent: float = 5.0, paired: bool = True, seed: int = 0
) -> Interval:
    """Return the ratio of two contenders' times with a bootstrap confidence interval.

    The estimate is exp of the truncated mean of log ratios of pairs (unpaired: of the difference of the truncated means of
    the logs). Its standard error comes from a circular block bootstrap (Politis & Romano 1992) with the block length for the
    series' first-order autocorrelation (Carlstein 1986); the bounds are Student-t with as many degrees of freedom as blocks
    (unpaired: those of Welch & Satterthwaite).

    Raises
    ------
    ValueError : if there are fewer than 2 pairs.
    NonFiniteError : if a time is not finite and positive.
    """
    a, b = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    if len(a) < 2 or len(b) < 2 or (paired and len(a) != len(b)):
        raise ValueError(f"{len(a)} and {len(b)} samples make no interval: at least 2 pairs are needed")
    if not (np.isfinite(a).all() and np.isfinite(b).all() and (a > 0).all() and (b > 0).all()):
        raise NonFiniteError("a time that is not a finite positive number: no figure is reported")
    rng = np.random.default_rng(seed)
    series = [np.log(a) - np.log(b)] if paired else [np.log(a), -np.log(b)]
    estimate, longest = 0.0, 1
    variances, freedoms = [], []
    for x in series:
        length = block_length(x)
        replicates = _trimmed_means(_resample(x, length, rng), percent)
        estimate += float(_trimmed_means(x[None], percent)[0])
        # n / (n - 1): the bootstrap's variance is that of a population, ours is a sample.
        blocks = max(2.0, len(x) / length)
        variances.append(float(replicates.var()) * blocks / (blocks - 1))
        freedoms.append(blocks - 1)
        longest = max(longest, length)
    margin = min(WIDEST, student_quantile(0.5 + LEVEL / 2, _welch(variances, freedoms)) * math.sqrt(sum(variances)))
    return Interval(
        math.exp(estimate), math.exp(estimate - margin), math.exp(estimate + margin), LEVEL, min(len(a), len(b)), longest
    )


def ratio_of_moments(numerator: Moments, denominator: Moments) -> Interval:
    """Return the ratio of two means that were measured apart, with a Student-t interval of its logarithm (delta method).

    Raises
    ------
    ValueError : if either rests on fewer than 2 samples.
    NonFiniteError : if a mean is not finite and positive, or a deviation not finite.
    """
    sides = (numerator, denominator)
    least = min(side.samples for side in sides)
    if least < 2:
        raise ValueError(f"{least} samples make no interval: at least 2 are needed")
    if not all(math.isfinite(s.mean) and s.mean > 0 and math.isfinite(s.std) and s.std >= 0 for s in sides):
        raise NonFiniteError("a time that is not a finite positive number: no figure is reported")
    errors = [side.relative_error for side in sides]
    freedom = _welch([error**2 for error in errors], [side.samples - 1 for side in sides])
    margin = min(WIDEST, student_quantile(0.5 + LEVEL / 2, freedom) * math.hypot(*errors))
    estimate = numerator.mean / denominator.mean
    return Interval(estimate, estimate * math.exp(-margin), estimate * math.exp(margin), LEVEL, least, 1)


def block_length(series: ArrayLike) -> int:
    """Return the bootstrap block length: 1 unless the lag-1 autocorrelation is beyond chance (2 / sqrt(n)).

    For AR(1) the best length is (2 rho^2 / (1 - rho^2)^2)^(1/3) n^(1/3) (Carlstein 1986), at most a tenth of the series.
    """
    x = np.asarray(series, np.float64)
    n = len(x)
    centred = x - x.mean()
    power = float(centred @ centred)
    if n < 8 or power == 0:
        return 1
    rho = float(centred[1:] @ centred[:-1]) / power
    if rho <= 2 / math.sqrt(n):
        return 1
    rho = min(rho, 0.97)
    best = (2 * rho**2 / (1 - rho**2) ** 2) ** (1 / 3) * n ** (1 / 3)
    return max(1, min(math.ceil(float(best)), n // 10))


def student_quantile(probability: float, freedom: float) -> float:
    """Return Student's t quantile by the Cornish-Fisher expansion (Abramowitz & Stegun 26.7.5); exact for 1 and 2."""
    if freedom <= 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom <= 2:
        alpha = 4 * probability * (1 - probability)
        return 2 * (probability - 0.5) * math.sqrt(2 / alpha)
    z = NormalDist().inv_cdf(probability)
    if math.isinf(freedom):
        return z
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3 + g4 / freedom**4


def _welch(variances: list[float], freedoms: list[float]) -> float:
    """Return the degrees of freedom of a sum of independent variances (Satterthwaite 1946)."""
    spread = sum(variance**2 / freedom for variance, freedom in zip(variances, freedoms, strict=True))
    return sum(variances) ** 2 / spread if spread else min(freedoms)


def _resample(series: Float64, length: int, rng: np.random.Generator) -> Float64:
    n = len(series)
    starts = rng.integers(0, n, (RESAMPLES, math.ceil(n / length)))
    indices = (starts[:, :, None] + np.arange(length)) % n
    resampled: Float64 = series[indices.reshape(RESAMPLES, -1)[:, :n]]
    return resampled


def _trimmed_means(rows: Float64, percent: float) -> Float64:
    n = rows.shape[1]
    cut = int(n * percent / 100)
    means: Float64 = np.sort(rows, axis=1)[:, cut : n - cut].mean(axis=1)
    return means
