"""What the documents show of tasks: our recipes (docs/quality.md), and other methods at equal bytes (docs/fidelity.md)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from frontier_figures import measured_with, short_name, table
from picture_files import picture_name

from elastickv.evaluation.metrics import Estimate
from elastickv.evaluation.tasks.paired_scores import FULL, SECOND_WORDING
from elastickv.html_report.charts.style import Chart
from elastickv.html_report.charts.task_charts import task_bits_chart
from elastickv.html_report.comparisons.task_scores import (
    LEAST_PERCENT,
    ComparedTasks,
    full_percent,
    mean_difference,
    scores_by_method,
    solved,
)
from elastickv.results.kinds.evaluation_result import EvaluationResult, TaskRow

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


@dataclass(frozen=True)
class MeasuredTasks:
    """A result's tasks of one length."""

    path: Path
    result: EvaluationResult
    rows: list[TaskRow]


Measured = dict[tuple[str, int], MeasuredTasks]


def task_results(pattern: str = "tasks") -> Measured:
    """Return the results and their tasks by model and length; those of a GPU stand for those of a CPU."""
    measured: Measured = {}
    for path in sorted(RESULTS.glob(f"*/{pattern}-*.json"), key=lambda path: (path.parent.name != "cpu", path)):
        result = EvaluationResult.from_dict(json.loads(path.read_text(encoding="utf-8")), path.name)
        for tokens in {row.tokens for row in result.tasks}:
            rows = [row for row in result.tasks if row.tokens == tokens]
            measured[short_name(result.model.name), tokens] = MeasuredTasks(path, result, rows)
    return dict(sorted(measured.items()))


def tasks() -> list[str]:
    """Return a table for each model and length: a row a task, a column a cache; differences are to full attention."""
    lines: list[str] = []
    for (model, tokens), measured in task_results().items():
        lines += [f"### {model}, {tokens} tokens", "", *_of_length(measured.result, measured.rows), ""]
    return lines[:-1]


def task_methods() -> list[str]:
    """Return a table for each model and length where other methods were measured too: what each changes the mean score by."""
    lines: list[str] = []
    for (model, tokens), measured in task_results("task_methods").items():
        compared, shown = _compared(measured), solved(measured.rows)
        scores = sorted((one for curve in scores_by_method(compared).values() for one in curve), key=lambda one: one.read_bits)
        points = {one.cache: _points(mean_difference(shown, one.cache)) for one in scores}
        words = _points(mean_difference(shown, SECOND_WORDING))
        lines += [
            f"### {model}, tasks of {tokens} tokens",
            "",
            measured_with(measured.result),
            "",
            f"![Change of the mean score of tasks against stored and read bits, {model} at {tokens} tokens]"
            f"(assets/{picture_name(measured.path)})",
            "",
            f"{', '.join(f'`{row.task}`' for row in shown)}, {shown[0].items} items each. Full attention on a second wording: "
            f"{words} points.",
            "",
            *table(
                ["method", "stored bits", "read bits", "change of the mean score, points"],
                [[f"`{s.cache}`", f"{s.stored_bits:.2f}", f"{s.read_bits:.2f}", points[s.cache]] for s in scores],
            ),
            "",
        ]
    return lines[:-1]


def pictures() -> Iterator[tuple[Path, Chart]]:
    """Yield the results of tasks by several methods, each with its picture."""
    for measured in task_results("task_methods").values():
        yield measured.path, next(task_bits_chart(1, _compared(measured)))


def _compared(measured: MeasuredTasks) -> ComparedTasks:
    result = measured.result
    return ComparedTasks(short_name(result.model.name), measured.rows[0].tokens, measured.rows, result.calibration is not None)


def _of_length(result: EvaluationResult, rows: Sequence[TaskRow]) -> list[str]:
    caches = list(dict.fromkeys(cache.cache for row in rows for cache in row.caches if cache.cache != FULL))
    shown = solved(rows)
    cells = []
    for row in shown:
        by_name = {cache.cache: cache.difference_points for cache in row.caches}
        cells.append(
            [f"`{row.task}`", str(row.items), f"{full_percent(row):.1f}", *(_points(by_name.get(name)) for name in caches)]
        )
    if len(shown) > 1:
        mean = np.mean([full_percent(row) for row in shown])
        cells.append(["all", str(sum(row.items for row in shown)), f"{mean:.1f}"])
        cells[-1] += [_points(mean_difference(shown, name)) for name in caches]
    lines = [measured_with(result), "", *table(["task", "items", "full attention, %", *caches], cells)]
    left_out = [f"`{row.task}` ({full_percent(row):.1f})" for row in rows if row not in shown]
    if left_out:
        lines += ["", f"Not shown, because full attention itself scores below {LEAST_PERCENT} %: {', '.join(left_out)}."]
    return lines


def _points(difference: Estimate | None) -> str:
    if difference is None:
        return "-"
    return f"{difference.mean:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]"
