"""The repetition rate of generated texts, a row for each cache."""

from typing import Any

from elastickv.html_report.charts.style import (
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
from elastickv.html_report.comparisons.generated_texts import GeneratedTexts
from elastickv.html_report.report_data import IntervalEstimate
from elastickv.results.kinds.evaluation_result import GenerationRow

MOST_ROWS = 24


def repetition_chart(number: int, generated: GeneratedTexts) -> Chart:
    """Return the rates of greedy and of sampled texts; those of full attention, the first row, as lines through all rows."""
    rows = generated.rows[:MOST_ROWS]
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.of_texts))

    def draw(figure: Any) -> None:
        axes = rows_axes(figure, [row.cache for row in rows])
        handles = []
        for place, kind in enumerate(kinds):
            for line, row in enumerate(rows):
                if kind not in row.of_texts:
                    continue
                rate = IntervalEstimate.over(row.of_texts[kind].repetition.mean, row.windows, 100)
                look = {"color": hue(place), "marker": marker(place), "markerfacecolor": hue(place) if line else PAPER}
                drawn = axes.errorbar(
                    [rate.estimate], [line], xerr=bars([rate]), capsize=3, linestyle="none", label=kind, **look
                )
                if line == 0:
                    handles.append(drawn)
                    axes.axvline(rate.estimate, color=hue(place), linewidth=0.8, linestyle=(0, (2, 2)))
        plain_axis(axes.xaxis)
        axes.set_xlim(left=0)
        axes.set_xlabel("4-grams that occurred before, % of a text's")
        legend(figure, handles)

    said = "; ".join(f"{row.cache} {_rates(row)}" for row in rows)
    where = f"{shown(generated.model)}, windows of {generated.context} tokens"
    left = len(generated.rows) - len(rows)
    return Chart(
        f"generations-{number}",
        f"Repetition of generated texts: {where}" + (f"; {left} caches more are in the table" if left else ""),
        f"Repetition rate of generated texts, {where}: {said}. Bars are 95 % intervals over windows; lines are "
        "full attention's rates.",
        draw,
        height=60 + 34 * len(rows) + legend_height(kinds),
    )


def _rates(row: GenerationRow) -> str:
    return ", ".join(f"{kind} {100 * figures.repetition.mean.mean:.3g} %" for kind, figures in row.of_texts.items())
