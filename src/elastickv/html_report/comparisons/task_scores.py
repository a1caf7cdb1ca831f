"""Tasks that were compared: those of one model and length, and the mean score of each method by its bits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elastickv.evaluation.metrics import Estimate, estimate
from elastickv.evaluation.tasks.paired_scores import FULL
from elastickv.html_report.comparisons.method_losses import DENSE_BITS, method_name, own_first
from elastickv.html_report.report_data import Evaluation, IntervalEstimate
from elastickv.results.kinds.evaluation_result import TaskRow, TaskScore

LEAST_PERCENT = 10  # of full attention: a task that it does not solve says nothing of a cache


@dataclass(frozen=True)
class ComparedTasks:
    """The scores of one model on tasks of one length."""

    model: str
    tokens: int
    rows: Sequence[TaskRow]
    calibrated: bool = False


@dataclass(frozen=True)
class MethodScore:
    """What a cache changes the mean score by, in points over all items of the tasks."""

    method: str
    cache: str
    stored_bits: float
    read_bits: float
    change: IntervalEstimate

    @property
    def cost(self) -> float:
        """The points that are lost."""
        return -self.change.estimate


def compared_tasks(evaluations: Sequence[Evaluation]) -> list[ComparedTasks]:
    """Return a comparison for each result and length; another dtype or calibration is another result."""
    several = len([evaluation for evaluation in evaluations if evaluation.tasks]) > 1
    together: dict[tuple[str, int, bool], list[TaskRow]] = {}
    for number, evaluation in enumerate(evaluations, 1):
        name = f"{evaluation.model}, {evaluation.dtype}, result {number}" if several else evaluation.model
        for task in evaluation.tasks:
            together.setdefault((name, task.tokens, bool(evaluation.calibration)), []).append(task)
    return [ComparedTasks(model, tokens, rows, calibrated) for (model, tokens, calibrated), rows in together.items()]


def solved(rows: Sequence[TaskRow]) -> list[TaskRow]:
    """Return the tasks that full attention solves often enough."""
    return [row for row in rows if full_percent(row) >= LEAST_PERCENT]


def full_percent(row: TaskRow) -> float:
    """Return the score of full attention."""
    return next(score.score_percent.mean for score in row.caches if score.cache == FULL)


def mean_difference(rows: Sequence[TaskRow], cache: str) -> Estimate | None:
    """Return a cache's mean score minus full attention's in points, over all items of tasks; None where one lacks the cache."""
    pairs = [(of_cache.scores, _of(row, FULL)[0].scores) for row in rows for of_cache in _of(row, cache)]
    if not rows or len(pairs) < len(rows):
        return None
    own, full = (np.concatenate(scores) for scores in zip(*pairs, strict=True))
    return estimate(own - full, shown=lambda mean: 100 * mean)


def scores_by_method(compared: ComparedTasks) -> dict[str, list[MethodScore]]:
    """Return method -> scores of its caches that were measured on all tasks that full attention solves, and count their bytes.

    A published format reads at each step what it stores.
    """
    rows, curves = solved(compared.rows), dict[str, list[MethodScore]]()
    for cache in dict.fromkeys(score.cache for row in rows for score in row.caches):
        scores = [score for row in rows for score in _of(row, cache)]
        change, stored = mean_difference(rows, cache), [score.stored_ratio for score in scores]
        if change is None or None in stored:
            continue
        stored_bits = _mean_bits(stored)
        read_bits = _mean_bits([score.read_ratio or score.stored_ratio for score in scores])
        own = scores[0].recipe_hash is not None
        selection = cache.rpartition(" C=")[0] if scores[0].read_ratio and not own else None
        method = method_name(cache, selection, own, compared.calibrated)
        items = sum(row.items for row in rows)
        curves.setdefault(method, []).append(
            MethodScore(method, cache, stored_bits, read_bits, IntervalEstimate.over(change, items))
        )
    return own_first(curves)


def _of(row: TaskRow, cache: str) -> list[TaskScore]:
    return [score for score in row.caches if score.cache == cache]


def _mean_bits(ratios: Sequence[float | None]) -> float:
    return float(np.mean([DENSE_BITS / ratio for ratio in ratios if ratio]))
