"""Figures as people read them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from elastickv.benchmark.stats.intervals import LEAST_PAIRS, Interval
from elastickv.results.speed_ratios import SpeedRatio

NO_INTERVAL = f"no interval: fewer than {LEAST_PAIRS} pairs"

_SIZES = ((1 << 30, "GiB", 2), (1 << 20, "MiB", 1), (1 << 10, "KiB", 1))


def size(count: float | None) -> str:
    """Return bytes in the largest unit that leaves a whole number of them; nothing for None."""
    if count is None:
        return ""
    for unit, name, digits in _SIZES:
        if count >= unit:
            return f"{count / unit:.{digits}f} {name}"
    return f"{count:.0f} B"


def duration(milliseconds: float | None) -> str:
    """Return a time with four digits, in microseconds below a millisecond; nothing for None."""
    if milliseconds is None:
        return ""
    return f"{1e3 * milliseconds:.4g} µs" if milliseconds < 1 else f"{_digits(milliseconds)} ms"


def interval(figure: Any, digits: int = 3, unit: str = "") -> str:
    """Return an estimate with its bounds, or with a word where it has none; nothing for None.

    Parameters
    ----------
    figure : has `estimate`, `low` and `high`; the bounds may be None.
    """
    if figure is None:
        return ""
    alone = f"{figure.estimate:.{digits}f}{unit}"
    return f"{alone} (no interval)" if figure.low is None else f"{alone} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"


def with_bounds(figure: Interval, digits: int = 3, unit: str = "") -> str:
    """Return an estimate with its bounds; fewer than three pairs have none."""
    if not figure.is_shown:
        return f"{figure.estimate:.{digits}f}{unit} ({NO_INTERVAL})"
    return f"{figure.estimate:.{digits}f}{unit} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"


def ratio_sentence(ratio: SpeedRatio) -> str:
    """Return how many times as fast one cache is as another, with the interval or the reason why there is none."""
    which = f"{ratio.fast} / {ratio.slow}: {ratio.estimate:.3f}"
    if ratio.low is None:
        return f"{which} times as fast, {NO_INTERVAL}"
    return f"{which} [{ratio.low:.3f}, {ratio.high:.3f}] times as fast, {ratio.samples} pairs"


def quantiles(samples: Sequence[float]) -> dict[str, str]:
    """Return the median, the 90th and the 99th percentile of times in milliseconds, and how many times p50 p99 is."""
    p50, p90, p99 = (float(quantile) for quantile in np.quantile(samples, (0.5, 0.9, 0.99)))
    return {"p50": duration(p50), "p90": duration(p90), "p99": duration(p99), "p99 / p50": f"{p99 / p50:.2f}"}


def fixed(value: float | None, digits: int) -> str:
    """Return a number with `digits` digits; an empty text for None."""
    return "" if value is None else f"{value:.{digits}f}"


def _digits(value: float) -> str:
    return f"{value:.4g}" if value < 1e4 else f"{value:.0f}"
