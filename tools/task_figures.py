"""What the documents show of tasks (docs/quality.md): full attention, a second wording of its prompts, and our recipes."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from frontier_figures import measured_with, short_name, table

from elastickv.evaluation.metrics import Estimate, estimate
from elastickv.evaluation.tasks.paired_scores import FULL
from elastickv.results.kinds.evaluation_result import EvaluationResult, TaskRow

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
LEAST_PERCENT = 10  # of full attention: a task that it does not solve says nothing of a cache

Measured = dict[tuple[str, int], tuple[EvaluationResult, list[TaskRow]]]


def task_results() -> Measured:
    """Return the results and their tasks by model and length; those of a GPU stand for those of a CPU."""
    measured: Measured = {}
    for path in sorted(RESULTS.glob("*/tasks-*.json"), key=lambda path: (path.parent.name != "cpu", path)):
        result = EvaluationResult.from_dict(json.loads(path.read_text(encoding="utf-8")), path.name)
        for tokens in {row.tokens for row in result.tasks}:
            measured[short_name(result.model.name), tokens] = (result, [row for row in result.tasks if row.tokens == tokens])
    return dict(sorted(measured.items()))


def solved(rows: Sequence[TaskRow]) -> list[TaskRow]:
    """Return the tasks that full attention solves often enough."""
    return [row for row in rows if _percent(row) >= LEAST_PERCENT]


def mean_difference(rows: Sequence[TaskRow], cache: str) -> Estimate | None:
    """Return a cache's mean score minus full attention's in points, over all items of tasks; None where one lacks the cache."""
    pairs = [
        (one.scores, full.scores)
        for row in rows
        for full in row.caches
        for one in row.caches
        if full.cache == FULL and one.cache == cache
    ]
    if not rows or len(pairs) < len(rows):
        return None
    own, full_scores = (np.concatenate(scores) for scores in zip(*pairs, strict=True))
    return estimate(own - full_scores, shown=lambda mean: 100 * mean)


def tasks() -> list[str]:
    """Return a table for each model and length: a row a task, a column a cache; differences are to full attention."""
    lines: list[str] = []
    for (model, tokens), (result, rows) in task_results().items():
        lines += [f"### {model}, {tokens} tokens", "", *_of_length(result, rows), ""]
    return lines[:-1]


def _of_length(result: EvaluationResult, rows: Sequence[TaskRow]) -> list[str]:
    caches = list(dict.fromkeys(cache.cache for row in rows for cache in row.caches if cache.cache != FULL))
    shown = solved(rows)
    cells = []
    for row in shown:
        by_name = {cache.cache: cache.difference_points for cache in row.caches}
        cells.append(
            [f"`{row.task}`", str(row.items), f"{_percent(row):.1f}", *(_points(by_name.get(name)) for name in caches)]
        )
    if len(shown) > 1:
        mean = np.mean([_percent(row) for row in shown])
        cells.append(["all", str(sum(row.items for row in shown)), f"{mean:.1f}"])
        cells[-1] += [_points(mean_difference(shown, name)) for name in caches]
    lines = [measured_with(result), "", *table(["task", "items", "full attention, %", *caches], cells)]
    left_out = [f"`{row.task}` ({_percent(row):.1f})" for row in rows if row not in shown]
    if left_out:
        lines += ["", f"Not shown, because full attention itself scores below {LEAST_PERCENT} %: {', '.join(left_out)}."]
    return lines


def _percent(row: TaskRow) -> float:
    return next(cache.score_percent.mean for cache in row.caches if cache.cache == FULL)


def _points(difference: Estimate | None) -> str:
    if difference is None:
        return "-"
    return f"{difference.mean:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]"
