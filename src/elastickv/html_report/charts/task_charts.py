"""The scores of tasks: a row a task and a point a cache, and the mean of all tasks against the bits of each method."""

from collections.abc import Iterator
from typing import Any

from elastickv.html_report.charts.curve_charts import READ, STORED, Panel, curves_chart
from elastickv.html_report.charts.style import (
    MUTED,
    PAPER,
    Chart,
    bars,
    hue,
    legend,
    legend_height,
    marker,
    plain_axis,
    rows_axes,
    shown,
)
from elastickv.html_report.comparisons.method_losses import front, read_bits, stored_bits
from elastickv.html_report.comparisons.task_scores import ComparedTasks, scores_by_method, solved
from elastickv.html_report.report_data import IntervalEstimate

MOST_CACHES = 10
_SPREAD = 0.45  # of a row, over which the points of its caches are spread


def task_chart(number: int, compared: ComparedTasks) -> Chart:
    """Return the scores of full attention in both wordings and of the first caches."""
    names = list(dict.fromkeys(score.cache for row in compared.rows for score in row.caches))
    drawn, left = names[:MOST_CACHES], len(names[MOST_CACHES:])
    labels = [row.task for row in compared.rows]

    def draw(figure: Any) -> None:
        axes = rows_axes(figure, labels)
        plain_axis(axes.xaxis)
        axes.set_xlim(-3, 103)
        handles = []
        for place, name in enumerate(drawn):
            points = [
                (row + _SPREAD * (place + 0.5) / len(drawn), IntervalEstimate.over(score.score_percent, task.items))
                for row, task in enumerate(compared.rows)
                for score in task.caches
                if score.cache == name
            ]
            look = {"color": MUTED, "markerfacecolor": PAPER} if place == 0 else {"color": hue(place - 1)}
            across, up = [score for _, score in points], [y for y, _ in points]
            style = {"marker": marker(place), "linestyle": "none", "label": shown(name), "capsize": 2}
            handles.append(axes.errorbar([score.estimate for score in across], up, xerr=bars(across), **style, **look))
        axes.set_xlabel("score, %")
        legend(figure, handles)

    said = "; ".join(
        f"{row.task} " + ", ".join(f"{s.cache} {s.score_percent.mean:.3g}" for s in row.caches if s.cache in drawn)
        for row in compared.rows
    )
    where = f"{shown(compared.model)}, {compared.tokens} tokens"
    rest = f" {left} more caches are in the table." if left else ""
    return Chart(
        f"tasks-{number}",
        f"Scores of tasks: {where}",
        f"Scores of tasks in percent, {where}: {said}.{rest}",
        draw,
        height=90 + 44 * len(labels) + legend_height(drawn),
    )


def task_bits_chart(number: int, compared: ComparedTasks) -> Iterator[Chart]:
    """Yield the change of the mean score against stored and against read bits, if bytes of a cache are counted."""
    curves = scores_by_method(compared)
    if not curves:
        return
    where = f"{shown(compared.model)}, {compared.tokens} tokens, {len(solved(compared.rows))} tasks"
    said = "; ".join(
        f"{name} " + ", ".join(f"{one.change.estimate:+.2g} at {one.read_bits:.2f}" for one in front(curve, read_bits))
        for name, curve in curves.items()
    )
    up = "change of the mean score, points"
    yield curves_chart(
        f"tasks-{number}-bits",
        f"Scores of tasks by bits: {where}",
        f"Change of the mean score of tasks against stored bits and against read bits, {where}. By read bits: {said}.",
        curves,
        [Panel(STORED, stored_bits, up, lambda one: one.change), Panel(READ, read_bits, up, lambda one: one.change)],
    )
