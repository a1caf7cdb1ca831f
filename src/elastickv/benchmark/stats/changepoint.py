"""Detect a lasting change of the device's speed from the samples alone, without telemetry."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A step this large means that clocks or other load changed; a smaller one may as well be drifting noise.
LEAST_STEP = 1.1
CHANCE = 5e-4  # probability of a false alarm on a steady machine
_FEWEST = 20


@dataclass(frozen=True)
class Changepoint:
    """A lasting change of speed.

    Attributes
    ----------
    sample : the first after it.
    ratio : median time from there on / median time before.
    """

    sample: int
    ratio: float


def find_changepoint(times: Sequence[float]) -> Changepoint | None:
    """Return where times changed level, by ranks (Pettitt 1979); None where they did not, or by less than `LEAST_STEP`.

    A change that does not last to the end is detected too, unless it is short.
    """
    n = len(times)
    if n < _FEWEST:
        return None
    values = np.asarray(times, np.float64)
    order = np.argsort(values, kind="stable")
    ranks = np.empty(n)
    ranks[order] = np.arange(1, n + 1)
    statistic = np.abs(2 * np.cumsum(ranks) - (n + 1) * np.arange(1, n + 1))
    first = int(np.argmax(statistic)) + 1
    probability = 2 * math.exp(-6 * float(statistic[first - 1]) ** 2 / (n**3 + n**2))
    if probability > CHANCE:
        return None
    ratio = float(np.median(values[first:]) / np.median(values[:first]))
    return Changepoint(first, ratio) if max(ratio, 1 / ratio) >= LEAST_STEP else None
