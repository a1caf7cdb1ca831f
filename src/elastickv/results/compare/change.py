"""The change of one figure between A and B: the interval of its times' ratio, a verdict, and the change of the error."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from elastickv.benchmark.accuracy import KERNEL_ERROR_LIMITS
from elastickv.benchmark.stats.intervals import (
    LEAST_PAIRS,
    Interval,
    SummaryStats,
    ratio_interval,
    ratio_of_summaries,
    truncated,
)
from elastickv.benchmark.stats.location import huber
from elastickv.results.compare.runs import BenchmarkRun, Cell, OutputErrors, Times

NO_SPREAD = "a file has no spread of it"
TOO_FEW = f"fewer than {LEAST_PAIRS} samples of a side"
NO_CONTROL = "measured against different dense contenders"
TOO_FAR = "dense itself takes so much longer on one side that the machine was not the same, and no control"
# Up to this ratio of dense times, drift is attributed to clocks and temperature, which slow elastic equally. Beyond it another
# process used the cores or the bandwidth, which affects dense and elastic differently by more than a margin.
DRIFT_LIMIT = 1.5
RUNS_FOR_SPREAD = 3  # with that many runs of A and of B, the interval comes from the spread between runs instead of within one
_ROUNDING = KERNEL_ERROR_LIMITS["fp32"]  # float32 rounding of an error: a smaller change is none

Series = Sequence[tuple[float, ...]]


@dataclass(frozen=True)
class FidelityChange:
    """The change of the recipe error.

    Attributes
    ----------
    a, b : recipe error on each side; None where it was not measured.
    ratio : the larger of B's mean over A's and B's p95 over A's; None where they cannot be compared.
    verdict : 'SAME', 'WORSE', 'BETTER' or 'UNKNOWN'.
    why : why it is unknown.
    """

    a: OutputErrors | None
    b: OutputErrors | None
    ratio: float | None
    verdict: str
    why: str = ""


@dataclass(frozen=True)
class Row:
    """One figure of one cell.

    Attributes
    ----------
    cell, figure : what was measured; 'step', 'cycle of N' tokens or 'token'.
    a, b : files of the runs on each side.
    a_ms, b_ms : time on each side, as its file reports it (the mean of several runs').
    recipe_a, recipe_b, ratio_read_a, ratio_read_b : what was run, and dense bytes / bytes read.
    ratio : B's time / A's, each against its control where dense was measured; None where there can be no interval.
    why : why there can be none; empty where there is one.
    control, drift : the dense contender that both sides measured in turns, and its time in B / in A; None without one.
    verdict : 'SAME', 'FASTER', 'SLOWER' or 'AMBIGUOUS'.
    fidelity : what became of the recipe error.
    tokens_per_s_a, tokens_per_s_b : of a model's decode; None of anything else.
    kv_bytes_a, kv_bytes_b : of a model's KV cache: 'read' in a step, 'stored' at the end; empty of anything else.
    """

    cell: Cell
    figure: str
    a: tuple[str, ...]
    b: tuple[str, ...]
    a_ms: float
    b_ms: float
    recipe_a: str | None
    recipe_b: str | None
    ratio_read_a: float | None
    ratio_read_b: float | None
    ratio: Interval | None
    why: str
    control: str | None
    drift: float | None
    verdict: str
    fidelity: FidelityChange
    tokens_per_s_a: float | None = None
    tokens_per_s_b: float | None = None
    kv_bytes_a: dict[str, float] = field(default_factory=dict)
    kv_bytes_b: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return asdict(self) | {"cell": dict(self.cell.pairs)}


@dataclass(frozen=True)
class TimeChange:
    """B's times over A's, or why they have no interval; their control, and its own time in B over that in A."""

    ratio: Interval | None
    why: str = ""
    control: str | None = None
    drift: float | None = None


def change(
    cell: Cell,
    figure: str,
    a: Sequence[BenchmarkRun],
    b: Sequence[BenchmarkRun],
    margins: tuple[float, float],
    controlled: bool,
) -> Row:
    """Return the change of a figure that both A and B measured.

    Parameters
    ----------
    a, b : runs of the cell.
    margins : of times and of recipe errors, percent.
    controlled : judge times against the dense contender that both sides measured in turns with them.
    """
    times_a, times_b = [run.figures[figure] for run in a], [run.figures[figure] for run in b]
    times = time_change(times_a, times_b, controlled)
    return Row(
        cell=cell,
        figure=figure,
        a=tuple(run.source for run in a),
        b=tuple(run.source for run in b),
        a_ms=float(np.mean([t.mean_ms for t in times_a])),
        b_ms=float(np.mean([t.mean_ms for t in times_b])),
        recipe_a=a[0].recipe,
        recipe_b=b[0].recipe,
        ratio_read_a=a[0].ratio_read,
        ratio_read_b=b[0].ratio_read,
        ratio=times.ratio,
        why=times.why,
        control=times.control,
        drift=times.drift,
        verdict=verdict(times.ratio, margins[0]),
        fidelity=fidelity_change(_worst(a, figure), _worst(b, figure), margins[1]),
        tokens_per_s_a=_mean_rate(times_a),
        tokens_per_s_b=_mean_rate(times_b),
        kv_bytes_a=_mean_bytes(times_a),
        kv_bytes_b=_mean_bytes(times_b),
    )


def verdict(ratio: Interval | None, margin_percent: float) -> str:
    """Return the verdict on an interval of B's time / A's: inside the margin, beyond it, or across its edge."""
    if ratio is None:
        return "AMBIGUOUS"
    edge = 1 + margin_percent / 100
    if ratio.low > edge:
        return "SLOWER"
    if ratio.high < 1 / edge:
        return "FASTER"
    return "SAME" if 1 / edge <= ratio.low and ratio.high <= edge else "AMBIGUOUS"


def time_change(a: Sequence[Times], b: Sequence[Times], controlled: bool) -> TimeChange:
    """Return the ratio of the times of B and A.

    Fewer than three samples of a side make no interval. Where dense was measured, but not the same contender on both sides,
    there is none to judge: the machine may have drifted. Nor is there where dense drifted too far to be a control.
    """
    if any(times.elastic is None for times in (*a, *b)):
        return TimeChange(None, NO_SPREAD)
    if min(_samples(a), _samples(b)) < LEAST_PAIRS:
        return TimeChange(None, TOO_FEW)
    if not controlled or not all(times.dense for times in (*a, *b)):
        return TimeChange(_as_they_stand(a, b))
    control = _control(a, b)
    if control is None:
        return TimeChange(None, NO_CONTROL)
    center_a, center_b = (float(np.mean([_center(times.dense[control]) for times in runs])) for runs in (a, b))
    drift = center_b / center_a
    if not 1 / DRIFT_LIMIT <= drift <= DRIFT_LIMIT:
        return TimeChange(None, TOO_FAR, control, drift)
    return TimeChange(_interval(_relative(a, control), _relative(b, control)), "", control, drift)


def fidelity_change(a: OutputErrors | None, b: OutputErrors | None, margin_percent: float) -> FidelityChange:
    """Return the change of the recipe error: worse if its mean or its p95 rose by more than the margin."""
    if a is None or b is None:
        missing = " and ".join(name for name, errors in (("A", a), ("B", b)) if errors is None)
        return FidelityChange(a, b, None, "UNKNOWN", f"no recipe error in {missing}")
    if a.measured_on != b.measured_on:
        return FidelityChange(a, b, None, "UNKNOWN", f"measured on {a.measured_on} in A, on {b.measured_on} in B")
    edge, pairs = 1 + margin_percent / 100, ((a.mean, b.mean), (a.p95, b.p95))
    if any(after > before * edge + _ROUNDING for before, after in pairs):
        judged = "WORSE"
    else:
        judged = "BETTER" if any(after < before / edge - _ROUNDING for before, after in pairs) else "SAME"
    return FidelityChange(a, b, b.mean / a.mean if a.mean else None, judged)


def _samples(runs: Sequence[Times]) -> int:
    """Return how many samples an interval would rest on."""
    counts = [t.elastic.samples if isinstance(t.elastic, SummaryStats) else len(t.elastic or ()) for t in runs]
    return len(runs) if len(runs) >= RUNS_FOR_SPREAD else sum(counts)


def _mean_rate(runs: Sequence[Times]) -> float | None:
    rates = [times.tokens_per_s for times in runs if times.tokens_per_s is not None]
    return sum(rates) / len(rates) if len(rates) == len(runs) else None


def _mean_bytes(runs: Sequence[Times]) -> dict[str, float]:
    names = [name for name in runs[0].kv_bytes if all(name in times.kv_bytes for times in runs)]
    return {name: sum(times.kv_bytes[name] for times in runs) / len(runs) for name in names}


def _control(a: Sequence[Times], b: Sequence[Times]) -> str | None:
    """Return a dense contender that every run timed in turns with elastic: A's baseline if it is one, for it comes first."""
    common = [name for name in a[0].dense if all(len(times.dense.get(name, ())) > 1 for times in (*a, *b))]
    return common[0] if common else None


def _relative(runs: Sequence[Times], control: str) -> Series:
    """Return elastic time / dense time, pair by pair: what disturbs both of a pair alike is in neither."""
    return [
        tuple(own / dense for own, dense in zip(times.elastic, times.dense[control], strict=False))
        for times in runs
        if isinstance(times.elastic, tuple)
    ]


def _as_they_stand(a: Sequence[Times], b: Sequence[Times]) -> Interval:
    series_a, series_b = ([t.elastic for t in runs if isinstance(t.elastic, tuple)] for runs in (a, b))
    if len(series_a) == len(a) and len(series_b) == len(b):
        return _interval(series_a, series_b)
    return ratio_of_summaries(_summary(b), _summary(a))


def _interval(a: Series, b: Series) -> Interval:
    if min(len(a), len(b)) >= RUNS_FOR_SPREAD:
        centers_a, centers_b = ([_center(samples) for samples in series] for series in (a, b))
        return ratio_interval(centers_b, centers_a, math.inf, paired=False)
    joined_a, joined_b = ([time for samples in series for time in samples] for series in (a, b))
    return ratio_interval(joined_b, joined_a, paired=False)


def _center(series: tuple[float, ...]) -> float:
    return math.exp(huber(np.log(series))[0])


def _summary(runs: Sequence[Times]) -> SummaryStats:
    """Return several runs as one: their spread combines that within them and that between them."""
    each = []
    for times in runs:
        if isinstance(times.elastic, SummaryStats):
            each.append(times.elastic)
        elif times.elastic is not None:
            samples = truncated(times.elastic, times.truncate)
            each.append(SummaryStats(float(samples.mean()), float(samples.std(ddof=1)), len(times.elastic), times.truncate))
    means = [m.mean for m in each]
    std = math.hypot(math.sqrt(float(np.mean([m.std**2 for m in each]))), float(np.std(means)))
    return SummaryStats(float(np.mean(means)), std, sum(m.samples for m in each), max(m.percent for m in each))


def _worst(runs: Sequence[BenchmarkRun], figure: str) -> OutputErrors | None:
    """Return the largest error of a figure over several runs; None if a run has none."""
    errors = [run.figures[figure].fidelity or run.fidelity for run in runs]
    return max((e for e in errors if e is not None), key=lambda e: e.mean) if all(errors) else None
