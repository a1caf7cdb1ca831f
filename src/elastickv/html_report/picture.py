"""The report as one picture: the headline and the charts that say most."""

import io
from textwrap import wrap
from typing import Any

from elastickv.errors import one_line
from elastickv.html_report.charts.style import INK, Chart, drawing, shown
from elastickv.html_report.content import Content

MOST = 4


def picture(content: Content) -> bytes:
    """Return a PNG: title, headline and the first chart of each of the first sections that have one."""
    from matplotlib.figure import Figure

    charts = [section.charts[0] for section in content.sections if section.charts][:MOST]
    columns = min(2, max(1, len(charts)))
    rows = -(-len(charts) // columns)
    width = 440 * columns
    sentences = wrap(one_line(content.headline.sentence), width // 7)
    head = 40 + 15 * len(sentences)
    heights = [max(_height(charts, columns * row + column) for column in range(columns)) for row in range(rows)]
    with drawing():
        whole = Figure(figsize=(width / 72, (head + sum(heights)) / 72), layout="constrained")
        parts = whole.subfigures(1 + rows, 1, height_ratios=[head, *heights], squeeze=False)[:, 0]
        parts[0].text(0.02, 0.92, shown(content.title), fontsize=14, fontweight="bold", color=INK, va="top")
        parts[0].text(0.02, 0.92 - 26 / head, "\n".join(sentences), fontsize=10, color=INK, va="top", linespacing=1.3)
        for row in range(rows):
            cells: Any = parts[row + 1].subfigures(1, columns, squeeze=False)[0]
            for chart, cell in zip(charts[row * columns : (row + 1) * columns], cells, strict=False):
                chart.draw(cell)
                cell.suptitle(shown(chart.title), fontsize=11, color=INK)
        out = io.BytesIO()
        whole.savefig(out, format="png", dpi=144, metadata={"Software": None})
    return out.getvalue()


def _height(charts: list[Chart], number: int) -> float:
    return charts[number].height + 24 if number < len(charts) else 0
