"""The KL divergence of KV formats against the bits that they store."""

from typing import Any

from elastickv.html_report.charts.fidelity_charts import LEAST_KL, MOST_NAMED
from elastickv.html_report.charts.style import (
    MUTED,
    PAPER,
    Chart,
    bars,
    bounds,
    hue,
    legend,
    legend_height,
    log_axis,
    marker,
    plain_axis,
    shown,
    span,
)
from elastickv.html_report.comparisons.format_losses import ComparedFormats
from elastickv.html_report.report_data import IntervalEstimate, Loss


def format_chart(number: int, compared: ComparedFormats) -> Chart:
    """Return a point for each format, those of the Pareto front named."""
    named = compared.front[:MOST_NAMED]
    rest = [loss for loss in compared.losses if loss not in named]
    labels = [loss.cache for loss in named]

    def kl(loss: Loss) -> IntervalEstimate:
        low, high = bounds(loss.kl)
        return IntervalEstimate(*(max(LEAST_KL, bound) for bound in (loss.kl.estimate, low, high)))

    def point(axes: Any, loss: Loss, **look: Any) -> Any:
        of_loss = kl(loss)
        return axes.errorbar([loss.stored_bits], [of_loss.estimate], yerr=bars([of_loss]), capsize=3, linestyle="none", **look)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        log_axis(axes.yaxis, *span([bound for loss in compared.losses for bound in bounds(kl(loss))], 1.8))
        plain_axis(axes.xaxis)
        for loss in rest:
            point(axes, loss, marker="o", color=MUTED, markerfacecolor=PAPER)
        handles = [
            point(axes, loss, marker=marker(place), color=hue(place), markersize=8, label=shown(labels[place]))
            for place, loss in enumerate(named)
        ]
        axes.set_xlabel("stored bits an element")
        axes.set_ylabel("KL divergence, nats a token")
        legend(figure, handles)

    front = "; ".join(f"{loss.cache} at {loss.stored_bits:.2f} bits {loss.kl.estimate:.2g}" for loss in named)
    where = f"{shown(compared.model)}, {compared.context} tokens"
    return Chart(
        f"formats-{number}",
        f"KV formats by stored bits: {where}",
        f"KL divergence against stored bits of {len(compared.losses)} KV formats, {where}. On the Pareto front: {front}.",
        draw,
        height=290 + legend_height(labels),
    )
