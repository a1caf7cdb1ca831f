"""Scores of tasks as a Markdown table: a row a cache, beside full attention and its own second wording."""

from collections.abc import Iterator, Sequence

from elastickv.evaluation.metrics import Estimate
from elastickv.results.formats.rows import markdown_cell
from elastickv.results.kinds.evaluation_result import TaskRow

HEADERS = ("task", "tokens", "items", "cache", "score %", "difference, points", "worse / better")


def task_lines(tasks: Sequence[TaskRow]) -> list[str]:
    """Return the lines of the table and what its columns are, after an empty line; none where there is no task."""
    if not tasks:
        return []
    rows = [[markdown_cell(cell) for cell in cells] for cells in task_cells(tasks)]
    table = [[*HEADERS], *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADERS))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    reasons = list(dict.fromkeys(reason for task in tasks for reason in task.skipped))
    return [
        "",
        *lines,
        "",
        "Scores are shares of the items, means with 95 % bootstrap intervals over items; differences are to full attention on "
        "the same items. Full attention on a second wording of the prompts shows what the words alone change.",
        *(f"left out: {markdown_cell(reason)}" for reason in reasons),
    ]


def task_cells(tasks: Sequence[TaskRow]) -> Iterator[list[str]]:
    """Yield the cells of a row for each task and cache."""
    for task in tasks:
        for number, cache in enumerate(task.caches):
            first = number == 0  # full attention itself
            yield [
                task.task,
                str(task.tokens),
                str(task.items),
                cache.cache,
                _interval(cache.score_percent, ""),
                "" if first else _interval(cache.difference_points, "+"),
                "" if first else f"{cache.worse} / {cache.better}",
            ]


def _interval(figure: Estimate, sign: str) -> str:
    return f"{figure.mean:{sign}.1f} [{figure.low:{sign}.1f}, {figure.high:{sign}.1f}]"
