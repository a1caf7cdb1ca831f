"""The loss of all methods against the bits that they store and read, a curve a method."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from elastickv.html_report.charts.fidelity_charts import LEAST_KL
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
from elastickv.html_report.comparisons.method_losses import (
    OWN,
    Bits,
    ComparedMethods,
    MethodLoss,
    front,
    read_bits,
    stored_bits,
)
from elastickv.html_report.report_data import IntervalEstimate, Loss

_LEAST_PERCENT = 0.01
_PANEL = 250
_STORED, _READ = "stored bits an element", "bits an element read in a step"
Figure = Callable[[Loss], IntervalEstimate]


def kl(loss: Loss) -> IntervalEstimate:
    """Return the KL divergence, as far as a logarithmic axis has it."""
    return _at_least(LEAST_KL, loss.kl.estimate, *bounds(loss.kl))


def other_top(loss: Loss) -> IntervalEstimate:
    """Return the share of tokens with another most likely prediction, in percent."""
    low, high = bounds(loss.top1_percent)
    return _at_least(_LEAST_PERCENT, 100 - loss.top1_percent.estimate, 100 - high, 100 - low)


def frontier_charts(number: int, compared: ComparedMethods) -> Iterator[Chart]:
    """Yield the KL divergence against stored and against read bits, then other measures against read bits."""
    where = f"{shown(compared.model)}, {compared.context} tokens"
    said = "; ".join(
        f"{name} " + ", ".join(f"{one.loss.kl.estimate:.2g} at {one.stored_bits:.2f}" for one in front(curve, stored_bits))
        for name, curve in compared.curves.items()
    )
    yield _chart(
        f"frontier-{number}",
        f"KL divergence by bits: {where}",
        f"KL divergence against stored bits and against read bits, {where}. By stored bits, on each method's front: {said}.",
        compared,
        [(_STORED, stored_bits, "KL, nats a token", kl), (_READ, read_bits, "KL, nats a token", kl)],
    )
    tops = "; ".join(
        f"{name} "
        + ", ".join(f"{other_top(one.loss).estimate:.2g} % at {one.read_bits:.2f}" for one in front(curve, read_bits))
        for name, curve in compared.curves.items()
    )
    yield _chart(
        f"frontier-{number}-predictions",
        f"Changed predictions and perplexity by read bits: {where}",
        f"Share of other top-1 predictions, and change of perplexity, against read bits, {where}. Other top-1: {tops}.",
        compared,
        [(_READ, read_bits, "other top-1, %", other_top), (_READ, read_bits, "perplexity, %", lambda loss: loss.ppl_percent)],
    )


def _chart(
    name: str, title: str, alt: str, compared: ComparedMethods, panels: Sequence[tuple[str, Bits, str, Figure]]
) -> Chart:
    labels = list(compared.curves)

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(len(panels), 1)
        handles: list[Any] = []
        for axes, (across, bits, up, value) in zip(all_axes, panels, strict=True):
            estimates = [value(one.loss) for one in compared.losses]
            log_axis(axes.xaxis, *span([bits(one) for one in compared.losses], 1.15), 2)
            if all(bound > 0 for estimate in estimates for bound in bounds(estimate)):
                log_axis(axes.yaxis, *span([bound for estimate in estimates for bound in bounds(estimate)], 1.8))
            else:
                _signed_axis(axes)
            handles = [
                _curve(axes, place, curve, bits, value, shown(labels[place]))
                for place, curve in enumerate(compared.curves.values())
            ]
            axes.set_xlabel(across)
            axes.set_ylabel(up)
        legend(figure, handles)

    return Chart(name, title, alt, draw, height=_PANEL * len(panels) + legend_height(labels))


def _curve(axes: Any, place: int, curve: Sequence[MethodLoss], bits: Bits, value: Figure, label: str) -> Any:
    """Draw a method: a line along its front with intervals, and what is behind it hollow."""
    best = front(curve, bits)
    rest = [one for one in curve if one not in best]
    color, symbol = hue(place), marker(place)
    behind = [value(one.loss).estimate for one in rest]
    axes.plot([bits(one) for one in rest], behind, symbol, color=color, markerfacecolor=PAPER, markersize=4)
    estimates = [value(one.loss) for one in best]
    own = label.startswith(OWN)
    return axes.errorbar(
        [bits(one) for one in best], [estimate.estimate for estimate in estimates], yerr=bars(estimates), capsize=2,
        color=color, marker=symbol, linestyle=line(place // len(HUES) * len(HUES)), linewidth=2.4 if own else 1.2,
        markersize=6 if own else 5, zorder=3 if own else 2, label=label,
    )  # fmt: skip


def _signed_axis(axes: Any) -> None:
    """Show changes of both signs: linear within 1, logarithmic beyond."""
    from matplotlib.ticker import FuncFormatter

    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.axhline(0, color=INK, linewidth=1)


def _at_least(least: float, estimate: float, low: float, high: float) -> IntervalEstimate:
    return IntervalEstimate(*(max(least, bound) for bound in (estimate, low, high)))
