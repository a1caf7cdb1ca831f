"""Methods by the bits that they store and read: a curve a method, along what no other point of it beats."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from elastickv.html_report.charts.style import (
    HUES,
    INK,
    PAPER,
    Chart,
    bars,
    bounds,
    hue,
    legend,
    legend_height,
    line,
    log_axis,
    marker,
    number,
    shown,
    span,
)
from elastickv.html_report.comparisons.method_losses import OWN, Bits, Point, front
from elastickv.html_report.report_data import IntervalEstimate

_PANEL = 250
STORED, READ = "stored bits an element", "bits an element read in a step"


@dataclass(frozen=True)
class Panel(Generic[Point]):
    """One pair of axes: what is across and how many bits that is, what is up and its value with its interval."""

    across: str
    bits: Bits
    up: str
    value: Callable[[Point], IntervalEstimate]


def curves_chart(
    name: str, title: str, alt: str, curves: Mapping[str, Sequence[Point]], panels: Sequence[Panel[Point]]
) -> Chart:
    """Return a chart of panels one below the other, with a curve for each method."""
    labels = list(curves)
    points = [one for curve in curves.values() for one in curve]

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(len(panels), 1)
        handles: list[Any] = []
        for axes, panel in zip(all_axes, panels, strict=True):
            estimates = [panel.value(one) for one in points]
            log_axis(axes.xaxis, *span([panel.bits(one) for one in points], 1.15), 2)
            if all(bound > 0 for estimate in estimates for bound in bounds(estimate)):
                log_axis(axes.yaxis, *span([bound for estimate in estimates for bound in bounds(estimate)], 1.8))
            else:
                _signed_axis(axes)
            handles = [_curve(axes, place, curve, panel, shown(label)) for place, (label, curve) in enumerate(curves.items())]
            axes.set_xlabel(panel.across)
            axes.set_ylabel(panel.up)
        legend(figure, handles)

    return Chart(name, title, alt, draw, height=_PANEL * len(panels) + legend_height(labels))


def _curve(axes: Any, place: int, curve: Sequence[Point], panel: Panel[Point], label: str) -> Any:
    """Draw a method: a line along its front with intervals, and what is behind it hollow."""
    best = front(curve, panel.bits)
    rest = [one for one in curve if one not in best]
    color, symbol = hue(place), marker(place)
    behind = [panel.value(one).estimate for one in rest]
    axes.plot([panel.bits(one) for one in rest], behind, symbol, color=color, markerfacecolor=PAPER, markersize=4)
    estimates = [panel.value(one) for one in best]
    own = label.startswith(OWN)
    return axes.errorbar(
        [panel.bits(one) for one in best], [estimate.estimate for estimate in estimates], yerr=bars(estimates), capsize=2,
        color=color, marker=symbol, linestyle=line(place // len(HUES) * len(HUES)), linewidth=2.4 if own else 1.2,
        markersize=6 if own else 5, zorder=3 if own else 2, label=label,
    )  # fmt: skip


def _signed_axis(axes: Any) -> None:
    """Show changes of both signs: linear within 1, logarithmic beyond."""
    from matplotlib.ticker import FuncFormatter

    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.axhline(0, color=INK, linewidth=1)
