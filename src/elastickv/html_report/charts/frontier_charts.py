"""The loss of all methods against the bits that they store and read, a curve a method."""

from collections.abc import Callable, Iterator

from elastickv.html_report.charts.curve_charts import READ, STORED, Panel, curves_chart
from elastickv.html_report.charts.fidelity_charts import LEAST_KL
from elastickv.html_report.charts.style import Chart, bounds, shown
from elastickv.html_report.comparisons.method_losses import ComparedMethods, MethodLoss, front, read_bits, stored_bits
from elastickv.html_report.report_data import IntervalEstimate, Loss

_LEAST_PERCENT = 0.01


def kl(loss: Loss) -> IntervalEstimate:
    """Return the KL divergence, as far as a logarithmic axis has it."""
    return _at_least(LEAST_KL, loss.kl.estimate, *bounds(loss.kl))


def other_top(loss: Loss) -> IntervalEstimate:
    """Return the share of tokens with another most likely prediction, in percent, as far as a logarithmic axis has it."""
    low, high = bounds(loss.top1_percent)
    return _at_least(_LEAST_PERCENT, _changed(loss), 100 - high, 100 - low)


def frontier_charts(number: int, compared: ComparedMethods) -> Iterator[Chart]:
    """Yield the KL divergence against stored and against read bits, then other measures against both."""
    where = f"{shown(compared.model)}, {compared.context} tokens"
    said = "; ".join(
        f"{name} " + ", ".join(f"{one.loss.kl.estimate:.2g} at {one.stored_bits:.2f}" for one in front(curve, stored_bits))
        for name, curve in compared.curves.items()
    )
    yield curves_chart(
        f"frontier-{number}",
        f"KL divergence by bits: {where}",
        f"KL divergence against stored bits and against read bits, {where}. By stored bits, on each method's front: {said}.",
        compared.curves,
        [Panel(STORED, stored_bits, "KL, nats a token", _of(kl)), Panel(READ, read_bits, "KL, nats a token", _of(kl))],
    )
    tops = "; ".join(
        f"{name} " + ", ".join(f"{_changed(one.loss):.2g} % at {one.read_bits:.2f}" for one in front(curve, read_bits))
        for name, curve in compared.curves.items()
    )
    yield curves_chart(
        f"frontier-{number}-predictions",
        f"Changed predictions and perplexity by bits: {where}",
        "Share of other top-1 predictions, and change of perplexity, against stored bits and against read bits, "
        f"{where}. Other top-1 by read bits: {tops}.",
        compared.curves,
        [
            Panel(across, bits, up, _of(figure))
            for up, figure in (("other top-1, %", other_top), ("perplexity, %", lambda loss: loss.ppl_percent))
            for across, bits in ((STORED, stored_bits), (READ, read_bits))
        ],
    )


def _changed(loss: Loss) -> float:
    return 100 - loss.top1_percent.estimate


def _of(figure: Callable[[Loss], IntervalEstimate]) -> Callable[[MethodLoss], IntervalEstimate]:
    return lambda one: figure(one.loss)


def _at_least(least: float, estimate: float, low: float, high: float) -> IntervalEstimate:
    return IntervalEstimate(*(max(least, bound) for bound in (estimate, low, high)))
