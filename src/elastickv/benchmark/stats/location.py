"""The location of a series of dependent, heavy-tailed values, and blocks to estimate its standard error."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]
# Huber's constant: deviations are clipped at this many (normal-consistent) deviations. 95 % as efficient as the mean where
# values are normal, and several times as efficient where bursts of other load hit one value in ten.
BEND = 1.345
MIRRORED = 2  # rounds per block of the sampler's order: a linear drift cancels in their mean
LEAST_BLOCKS = 8  # at least this many, however long the blocks should be
_FEWEST = 10  # values needed to detect dependence
_STRONGEST = 0.95
_NORMAL_QUARTILES = 1.3489795003921634  # between the quartiles of a standard normal law
_LEAST_SLOPE = 0.3
_STEPS = 50
_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Location:
    """An estimate of location and its uncertainty.

    Attributes
    ----------
    estimate : Huber's M-estimate.
    variance : its squared standard error.
    freedom : degrees of freedom of the variance: fewer where blocks are long or dependence had to be estimated.
    block_length : values to a block.
    """

    estimate: float
    variance: float
    freedom: float
    block_length: int


def locate(series: ArrayLike, bend: float = BEND, first: int = 0, symmetric: bool = True) -> Location:
    """Return the location of a series, in the order in which it was measured.

    The influence of each value on the estimate (Huber 1964) makes a series whose mean has the estimate's error. From ten values
    on it is freed of dependence: a first-order autoregression is taken out if its coefficient, corrected for bias (Marriott &
    Pope 1954), is positive (prewhitening: Andrews & Monahan 1992; what estimating it costs is taken off the degrees of freedom
    by Satterthwaite's rule), and the rest is cut into blocks of whole mirrored rounds, over which a drift cancels, as long as
    Politis & White (2004) would have them. The variance is the one that resampling those blocks converges to: for a mean it
    needs no random numbers (Carlstein 1986; Kuensch 1989).

    Parameters
    ----------
    series : (n,) values, n >= 2.
    bend : Huber's constant; infinity gives the mean.
    first : number of the first value in the sampler's order; mirrored rounds begin at even ones.
    symmetric : whether bursts go either way, as they do in ratios. Times by themselves have them above only: there Huber's
        scale would add an error of its own, and the estimate is the midmean.
    """
    values = np.asarray(series, np.float64)
    n = len(values)
    estimate, influence = huber(values, bend) if symmetric or math.isinf(bend) else midmean(values)
    rho, length = 0.0, 1
    if n >= _FEWEST:
        rho = min(max(0.0, _first_autocorrelation(influence)), _STRONGEST)
        influence = _prewhitened(influence, rho)
        mirrored = _block_means(influence, MIRRORED, first % MIRRORED)
        length = MIRRORED * min(block_length(mirrored), max(1, len(mirrored) // LEAST_BLOCKS))
    blocks = _block_means(influence, length, first % MIRRORED if length > 1 else 0)
    lost = 1 / (len(blocks) - 1)
    if rho:
        lost += 2 * (1 + rho) / ((1 - rho) * n)
    return Location(estimate, float(blocks.var(ddof=1)) / len(blocks), 1 / lost, length)


def huber(values: Float64, bend: float = BEND) -> tuple[float, Float64]:
    """Return Huber's M-estimate (1964), its scale from the distance of the quartiles, and each value's influence on it.

    The median deviation, the usual scale, collapses where values have two modes, such as two clocks. Where half of the values
    are the same, and with an infinite `bend`, it is the mean.
    """
    ordered = np.sort(values)
    lower, center, upper = (_quantile(ordered, share) for share in (0.25, 0.5, 0.75))
    bound = bend * (upper - lower) / _NORMAL_QUARTILES
    if not math.isfinite(bound) or bound == 0:
        return float(values.mean()), values - values.mean()
    for _ in range(_STEPS):
        step = float(_influence(values, center, bound).mean())
        center += step
        if abs(step) <= _TOLERANCE * bound:
            break
    return center, _influence(values, center, bound)


def midmean(values: Float64) -> tuple[float, Float64]:
    """Return the mean without a quarter of the values at either end, and the values' influence (Tukey & McLaughlin 1963)."""
    ordered = np.sort(values)
    cut = len(values) // 4
    middle = ordered[cut : len(values) - cut]
    winsorized = np.clip(values, middle[0], middle[-1])
    influence: Float64 = (winsorized - winsorized.mean()) * (len(values) / len(middle))
    return float(middle.mean()), influence


def block_length(series: Float64) -> int:
    """Return the block length of Politis & White (2004; corrected by Patton, Politis & White 2009) for a circular bootstrap."""
    n = len(series)
    centered = series - series.mean()
    power = float(centered @ centered)
    if n < LEAST_BLOCKS or power == 0:
        return 1
    patience = max(5, math.ceil(math.sqrt(math.log10(n))))
    lags = min(math.ceil(math.sqrt(n)) + patience, n - 1)
    rho = np.array([float(centered[lag:] @ centered[: n - lag]) for lag in range(1, lags + 1)]) / power
    beyond_chance = np.flatnonzero(np.abs(rho) >= 2 * math.sqrt(math.log10(n) / n))
    last = 0
    for seen in beyond_chance.tolist():
        if seen + 1 - last > patience:
            break
        last = seen + 1
    if last == 0:
        return 1
    lag = np.arange(1, min(2 * last, lags) + 1)
    # A flat-top window: 1 up to the middle, then falling.
    window = np.clip(2 * (1 - lag / (2 * last)), 0, 1)
    spectrum = 1 + 2 * float(window @ rho[: len(lag)])
    if spectrum <= 0:
        return 1
    curvature = 2 * float((window * lag) @ rho[: len(lag)])
    return max(1, math.ceil(math.pow(1.5 * (curvature / spectrum) ** 2 * n, 1 / 3)))


def _quantile(ordered: Float64, share: float) -> float:
    below, part = divmod(share * (len(ordered) - 1), 1)
    pair = ordered[int(below) : int(below) + 2]
    return float(pair[0] + part * (pair[-1] - pair[0]))


def _influence(values: Float64, center: float, bound: float) -> Float64:
    deviations = values - center
    share = max(_LEAST_SLOPE, float((np.abs(deviations) < bound).mean()))
    influence: Float64 = np.clip(deviations, -bound, bound) / share
    return influence


def _first_autocorrelation(series: Float64) -> float:
    """Return the first autocorrelation of a centered series, its bias of -(1 + 4 rho) / n corrected (Marriott & Pope 1954)."""
    power = float(series @ series)
    if power == 0:
        return 0.0
    rho = float(series[1:] @ series[:-1]) / power
    return rho + (1 + 4 * rho) / len(series)


def _prewhitened(series: Float64, rho: float) -> Float64:
    """Return the innovations of a first-order autoregression, scaled so that their mean varies as much as the series' does."""
    if rho == 0:
        return series
    n = len(series)
    innovations = np.empty_like(series)
    innovations[0] = series[0] * math.sqrt(1 - rho**2)
    innovations[1:] = series[1:] - rho * series[:-1]
    # The variance of a mean of n values of an autoregression, over that of as many innovations.
    stationary = 1 + 2 * (rho / (1 - rho) - rho * (1 - rho**n) / (n * (1 - rho) ** 2))
    scaled: Float64 = innovations * math.sqrt(stationary / (1 - rho**2))
    return scaled


def _block_means(series: Float64, length: int, lead: int) -> Float64:
    """Return the means of consecutive blocks: the first `lead` values belong to the first, the remainder to the last."""
    starts = lead + np.arange((len(series) - lead) // length) * length
    starts[0] = 0
    means: Float64 = np.add.reduceat(series, starts) / np.diff(np.append(starts, len(series)))
    return means
