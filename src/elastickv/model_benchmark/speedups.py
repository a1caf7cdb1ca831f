"""Speed-ups between generations that took turns, and the noise floor of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from elastickv.benchmark.stats.intervals import Interval, ratio_interval

if TYPE_CHECKING:
    from elastickv.model_benchmark.generation import Generation


def step_means(generation: Generation) -> list[float]:
    """Return the mean seconds per step of each piece that has steps."""
    return [sum(piece.step_s) / len(piece.step_s) for piece in generation.pieces if piece.step_s]


def speedup(baseline: Generation, other: Generation, skipped: int = 0) -> Interval | None:
    """Return the speed-up of the other's steps over the baseline's, without the first `skipped` pieces.

    None if fewer than two pieces of both have steps.
    """
    before, after = step_means(baseline)[skipped:], step_means(other)[skipped:]
    pairs = min(len(before), len(after))
    return ratio_interval(before[:pairs], after[:pairs], first=skipped) if pairs >= 2 else None


def noise_floor(samples: Sequence[float]) -> Interval | None:
    """Return the ratio of the even samples to the odd ones: what the machine's noise alone looks like.

    None for fewer than two pairs.
    """
    pairs = len(samples) // 2
    return ratio_interval(samples[: 2 * pairs : 2], samples[1 : 2 * pairs : 2]) if pairs >= 2 else None
