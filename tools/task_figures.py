"""What the documents show of tasks (docs/quality.md): scores of full attention, of a second wording, and of our recipes."""

import json
from collections.abc import Sequence
from pathlib import Path

from frontier_figures import measured_with, short_name, table

from elastickv.results.kinds.evaluation_result import EvaluationResult, TaskRow, TaskScore

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def tasks() -> list[str]:
    """Return a table for each model and length: a row a task, a column a cache; differences are to full attention."""
    lines: list[str] = []
    for path in sorted(RESULTS.glob("*/tasks-*.json")):
        result = EvaluationResult.from_dict(json.loads(path.read_text(encoding="utf-8")), path.name)
        for tokens in sorted({task.tokens for task in result.tasks}):
            lines += [*_of_length(result, [task for task in result.tasks if task.tokens == tokens]), ""]
    return lines[:-1]


def _of_length(result: EvaluationResult, rows: Sequence[TaskRow]) -> list[str]:
    caches = list(dict.fromkeys(cache.cache for task in rows for cache in task.caches))
    cells = []
    for task in rows:
        by_name = {cache.cache: cache for cache in task.caches}
        shown = [_score(by_name[name]) if name in by_name else "-" for name in caches]
        cells.append([f"`{task.task}`", str(task.items), *shown])
    return [
        f"### {short_name(result.model.name)}, {rows[0].tokens} tokens",
        "",
        measured_with(result),
        "",
        *table(["task", "items", *caches], cells),
    ]


def _score(cache: TaskScore) -> str:
    score, difference = cache.score_percent, cache.difference_points
    if cache.cache == "full":
        return f"{score.mean:.1f}"
    return f"{score.mean:.1f} ({difference.mean:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}])"
