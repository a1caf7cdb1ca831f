"""Speed-ups between generations that took turns, and the noise floor of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from elastickv.benchmark.stats.intervals import LEAST_PAIRS, Interval, ratio_interval

if TYPE_CHECKING:
    from elastickv.model_benchmark.generation import Generation


def step_means(generation: Generation) -> list[float]:
    """Return the mean seconds per step of each piece that has steps."""
    return [sum(piece.step_s) / len(piece.step_s) for piece in generation.pieces if piece.step_s]


def speedup(baseline: Generation, other: Generation, skipped: int = 0) -> Interval | None:
    """Return the speed-up of the other's steps over the baseline's, without the first `skipped` pieces.

    None if fewer than three pieces of both have steps: two pairs make no interval.
    """
    before, after = step_means(baseline)[skipped:], step_means(other)[skipped:]
    pairs = min(len(before), len(after))
    return interval_or_none(before[:pairs], after[:pairs], first=skipped)


def noise_floor(samples: Sequence[float]) -> Interval | None:
    """Return the ratio of the even samples to the odd ones: what the machine's noise alone looks like.

    None for fewer than three pairs.
    """
    pairs = len(samples) // 2
    return interval_or_none(samples[: 2 * pairs : 2], samples[1 : 2 * pairs : 2])


def interval_or_none(numerator: Sequence[float], denominator: Sequence[float], first: int = 0) -> Interval | None:
    """Return the ratio of paired times with its interval, as `ratio_interval`; None for fewer than three pairs."""
    return ratio_interval(numerator, denominator, first=first) if len(numerator) >= LEAST_PAIRS else None


def mean_interval(times: Sequence[float]) -> Interval | None:
    """Return the mean of times with its interval, in their unit; None for fewer than three."""
    return interval_or_none(times, [1.0] * len(times))
