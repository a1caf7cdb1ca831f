"""The KL divergence of selections against the bytes that they read."""

from typing import Any

from elastickv.html_report.charts.fidelity_charts import LEAST_KL
from elastickv.html_report.charts.style import (
    HUES,
    Chart,
    bars,
    bounds,
    hue,
    legend,
    legend_height,
    line,
    log_axis,
    marker,
    shown,
    span,
)
from elastickv.html_report.comparisons.selection_losses import ComparedSelections
from elastickv.html_report.report_data import IntervalEstimate, Loss

_MIB = 1 << 20


def selection_chart(number: int, compared: ComparedSelections) -> Chart:
    """Return a curve for each method."""
    labels = list(compared.curves)
    losses = [loss for curve in compared.curves.values() for loss in curve]

    def kl(loss: Loss) -> IntervalEstimate:
        low, high = bounds(loss.kl)
        return IntervalEstimate(*(max(LEAST_KL, bound) for bound in (loss.kl.estimate, low, high)))

    def mebibytes(loss: Loss) -> float:
        return (loss.read_bytes or 0) / _MIB

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        log_axis(axes.xaxis, *span([mebibytes(loss) for loss in losses], 1.25), 2)
        log_axis(axes.yaxis, *span([bound for loss in losses for bound in bounds(kl(loss))], 1.8))
        handles = []
        for place, curve in enumerate(compared.curves.values()):
            figures = [kl(loss) for loss in curve]
            look = {"color": hue(place), "marker": marker(place), "linestyle": line(place // len(HUES) * len(HUES))}
            across, up = [mebibytes(loss) for loss in curve], [figure.estimate for figure in figures]
            handles.append(axes.errorbar(across, up, yerr=bars(figures), capsize=3, label=shown(labels[place]), **look))
        axes.set_xlabel("MiB read in a step")
        axes.set_ylabel("KL divergence, nats a token")
        legend(figure, handles)

    said = "; ".join(
        f"{name} " + ", ".join(f"{loss.kl.estimate:.2g} at {mebibytes(loss):.3g} MiB" for loss in curve)
        for name, curve in compared.curves.items()
    )
    where = f"{shown(compared.model)}, {compared.context} tokens"
    return Chart(
        f"selections-{number}",
        f"Selections by read bytes: {where}",
        f"KL divergence against the bytes that a step reads, {where}: {said}.",
        draw,
        height=290 + legend_height(labels),
    )
