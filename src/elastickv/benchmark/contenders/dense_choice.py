"""The choice of the dense baseline: paired comparisons in which a tie goes to the model's own dtype."""

import math
import time
from collections.abc import Sequence
from statistics import median

from elastickv.benchmark.contenders.base import Contender
from elastickv.benchmark.result import DenseComparison
from elastickv.benchmark.sampler import collect
from elastickv.benchmark.stats.intervals import Interval, ratio_interval
from elastickv.recipe import DTYPES

TIE = 0.02  # a smaller difference is a tie, however narrow its interval
FIRST_PAIRS, USUAL_PAIRS, MOST_PAIRS = 4, 16, 512
ENOUGH_S = 1.0  # beyond the usual pairs, where samples are short and noisy
CLEAR = 0.1  # of the logarithm of a ratio: beyond it fewer than the usual pairs decide
HOPELESS = 1.5  # a peer whose preview takes this many times as long needs no pairs


def in_turns(
    reference: Contender, other: Contender, seed: int = 0, usual: int = USUAL_PAIRS, within_s: float = math.inf
) -> tuple[DenseComparison, float, float]:
    """Compare two contenders in randomized mirrored blocks; return the comparison and the milliseconds of each.

    The first pairs decide where the difference is clear. Otherwise `usual` pairs are taken; where those leave it open, more
    until it is decided or a second is over. No more than end within `within_s`.
    """
    start = time.monotonic()
    timed = {"reference": reference.sample, "other": other.sample}
    times: dict[str, list[float]] = {name: [] for name in timed}
    wanted = FIRST_PAIRS
    while True:
        block = collect(timed, wanted, paired=True, seed=seed + len(times["other"]))
        if not block.complete:
            raise KeyboardInterrupt
        for name, series in block.times.items():
            times[name] += series
        speed = ratio_interval(times["reference"], times["other"])
        pairs, elapsed = len(times["other"]), time.monotonic() - start
        wanted = pairs  # twice as many
        if _enough(speed, pairs, usual, 2 * elapsed) or 2 * elapsed > within_s:
            return DenseComparison(other.name, reference.name, speed), median(times["reference"]), median(times["other"])


def _enough(speed: Interval, pairs: int, usual: int, twice_s: float) -> bool:
    """Whether the pairs decide, or twice as many, which take `twice_s`, would be too many."""
    decided = speed.low > 1 + TIE or speed.high < 1 + TIE
    if pairs < usual:
        return decided and abs(math.log(speed.estimate)) > CLEAR
    return decided or pairs >= MOST_PAIRS or twice_s > ENOUGH_S


def is_faster(comparison: DenseComparison) -> bool:
    """Whether a contender is faster than its reference: its interval lies above a tie."""
    return comparison.speed.low > 1 + TIE


def dtypes_to_try(model_dtype: str, only: str | None) -> tuple[str, ...]:
    """Return the dtypes of our dense contenders, the model's own first: it is the baseline unless another one is faster."""
    return (only,) if only is not None else (model_dtype, *(dtype for dtype in DTYPES if dtype != model_dtype))


def why_baseline(
    baseline: Contender, model_dtype: str, compared: Sequence[DenseComparison], only: str | None, not_run: Sequence[str]
) -> str:
    """Return why this contender is the baseline."""
    won = next((each for each in compared if each.name == baseline.name and is_faster(each)), None)
    if won is not None:
        return f"faster than {won.reference} by more than {100 * TIE:g} % with 95 % confidence: {_described(won)}"
    if only is not None:
        return f"`dense`={only} is the only dtype that was requested"
    own = "the model's own dtype" if baseline.dtype == model_dtype else "the first dtype that fits the memory"
    others = [_described(each) for each in compared if each.reference == baseline.name]
    if others:
        own += f"; no other is faster by more than {100 * TIE:g} % with 95 % confidence: {', '.join(others)}"
    return f"{own}; not compared: {', '.join(not_run)}" if not_run else own


def _described(comparison: DenseComparison) -> str:
    speed = comparison.speed
    return f"{comparison.name} {speed.estimate:.3f}x [{speed.low:.3f}, {speed.high:.3f}]"
