"""Estimates and intervals from paired, possibly autocorrelated samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from elastickv.benchmark.stats.location import BEND, Float64, locate
from elastickv.errors import NonFiniteError

WIDEST = 25.0  # half an interval of a ratio's logarithm: a wider one says no more, and readers accept its bounds
LEVEL = 0.95
LEAST_PAIRS = 3  # of an interval that is shown: the bounds of two pairs have one degree of freedom, and say nothing


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval.

    Attributes
    ----------
    estimate, low, high : the figure and its bounds.
    level : confidence, such as 0.95.
    samples : pairs that it rests on.
    block_length : samples to a block: 1 where they are too few to see dependence, 2 where they look independent.
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

    @property
    def is_shown(self) -> bool:
        """Whether it rests on enough pairs to be shown."""
        return self.samples >= LEAST_PAIRS

    def contains(self, value: float) -> bool:
        """Whether `value` is inside."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class SummaryStats:
    """The statistics of samples that a file does not hold.

    Attributes
    ----------
    mean, std : of the samples that are left, in one unit.
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

        It is the winsorized deviation that counts, and cutting has narrowed the one we know: both follow from the curve.
        """
        share, widened = self.percent / 100, 1.0
        if share:
            normal = NormalDist()
            z = normal.inv_cdf(1 - share)
            variance = 1 - 2 * z * normal.pdf(z) / (1 - 2 * share)
            widened = math.sqrt((1 - 2 * share) + 2 * share * z**2 / variance) / (1 - 2 * share)
        return widened * self.std / self.mean / math.sqrt(self.samples)


def truncated(samples: ArrayLike, percent: float) -> Float64:
    """Return the sorted samples without `percent` % of them at either end."""
    ordered = np.sort(np.asarray(samples, np.float64))
    cut = int(len(ordered) * percent / 100)
    return ordered[cut : len(ordered) - cut]


def ratio_interval(
    numerator: Sequence[float], denominator: Sequence[float], bend: float = BEND, paired: bool = True, first: int = 0
) -> Interval:
    """Return the ratio of two contenders' times with its confidence interval.

    The estimate is exp of the location (`locate`: Huber's) of the log ratios of pairs, in the order in which they were
    measured; unpaired, of the difference of the midmeans of the logs. The bounds are Student-t; unpaired, with the degrees of
    freedom of Welch & Satterthwaite. benchmarks/statistics_study.py shows how often they hold the truth.

    Parameters
    ----------
    numerator, denominator : times, in one unit.
    bend : Huber's constant; infinity gives the ratio of the geometric means.
    first : round of the first pair in the sampler's order.

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
    series = [np.log(a) - np.log(b)] if paired else [np.log(a), -np.log(b)]
    locations = [locate(x, bend, first, symmetric=paired) for x in series]
    estimate = sum(where.estimate for where in locations)
    variances = [where.variance for where in locations]
    freedom = _welch(variances, [where.freedom for where in locations])
    margin = min(WIDEST, student_quantile(0.5 + LEVEL / 2, freedom) * math.sqrt(sum(variances)))
    return Interval(
        math.exp(estimate),
        math.exp(estimate - margin),
        math.exp(estimate + margin),
        LEVEL,
        min(len(a), len(b)),
        max(where.block_length for where in locations),
    )


def beyond_noise(speedup: Interval, noise_floor: Interval | None) -> bool:
    """Whether a speed-up is beyond noise: its whole interval is above 1 and above the interval of the noise floor."""
    return noise_floor is not None and speedup.low > max(1.0, noise_floor.high)


def ratio_of_summaries(numerator: SummaryStats, denominator: SummaryStats) -> Interval:
    """Return the ratio of two means that were measured separately, with a Student-t interval of its logarithm (delta method).

    Raises
    ------
    ValueError : if either rests on fewer than 2 samples.
    NonFiniteError : if a mean is not finite and positive, or a deviation not finite.
    """
    summaries = (numerator, denominator)
    least = min(summary.samples for summary in summaries)
    if least < 2:
        raise ValueError(f"{least} samples make no interval: at least 2 are needed")
    if not all(math.isfinite(s.mean) and s.mean > 0 and math.isfinite(s.std) and s.std >= 0 for s in summaries):
        raise NonFiniteError("a time that is not a finite positive number: no figure is reported")
    errors = [summary.relative_error for summary in summaries]
    freedom = _welch([error**2 for error in errors], [summary.samples - 1 for summary in summaries])
    margin = min(WIDEST, student_quantile(0.5 + LEVEL / 2, freedom) * math.hypot(*errors))
    estimate = numerator.mean / denominator.mean
    return Interval(estimate, estimate * math.exp(-margin), estimate * math.exp(margin), LEVEL, least, 1)


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
