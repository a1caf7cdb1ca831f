"""Fidelity against bytes, and the pass keys found."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from elastickv.html_report.charts.speed_charts import family
from elastickv.html_report.charts.style import (
    HUES,
    INK,
    MUTED,
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
    plain_axis,
    shown,
    span,
)
from elastickv.html_report.report_data import Evaluation, IntervalEstimate, Loss, Needle, Step

LEAST_KL = 1e-6  # what is closer to full attention than this is drawn here: rounding, and no loss
MOST_NAMED = 16
MOST_ROWS = 24
_MOST_DEPTHS = 10


@dataclass(frozen=True)
class Offer:
    """What one recipe offers: dense bytes / bytes read, and the error that it costs."""

    name: str
    read: float
    error: IntervalEstimate
    kind: str


def offers(steps: Sequence[Step]) -> list[Offer]:
    """Return what each recipe offers, once: of several results the one that reads least."""
    by_name: dict[str, Offer] = {}
    for step in steps:
        if step.error is None or step.read is None:
            continue
        offer = Offer(step.what, step.read, IntervalEstimate(step.error.mean), family(step.what))
        known = by_name.get(offer.name)
        if known is None or (offer.error.estimate, -offer.read) < (known.error.estimate, -known.read):
            by_name[offer.name] = offer
    return sorted(by_name.values(), key=lambda offer: offer.read)


def front(candidates: Sequence[Offer]) -> list[Offer]:
    """Return the Pareto front: what nothing else beats in bytes and in error at once, by bytes."""

    def beaten(offer: Offer) -> bool:
        return any(
            other.read >= offer.read
            and other.error.estimate <= offer.error.estimate
            and (other.read, other.error.estimate) != (offer.read, offer.error.estimate)
            for other in candidates
        )

    return sorted((offer for offer in candidates if not beaten(offer)), key=lambda offer: offer.read)


def error_chart(steps: Sequence[Step]) -> Chart | None:
    """Return the recipe error against C, the Pareto front's recipes named; None where there is no error above 0."""
    shown_offers = [offer for offer in offers(steps) if offer.error.estimate > 0]
    if not shown_offers:
        return None
    best = front(shown_offers)
    named = best[:MOST_NAMED]
    labels = [f"{number}  {offer.name}" for number, offer in enumerate(named, 1)]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        log_axis(axes.xaxis, *span([offer.read for offer in shown_offers], 1.25), 2)
        log_axis(axes.yaxis, *span([offer.error.estimate for offer in shown_offers], 1.6))
        across, up = [offer.read for offer in best], [offer.error.estimate for offer in best]
        axes.step(across, up, where="pre", color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)))
        rest = [offer for offer in shown_offers if offer not in best]
        axes.plot(
            [offer.read for offer in rest], [offer.error.estimate for offer in rest], "o", color=MUTED, markerfacecolor=PAPER
        )
        handles = []
        for number, offer in enumerate(named, 1):
            point = axes.plot(
                offer.read, offer.error.estimate, linestyle="none", marker=marker(number), color=hue(number - 1),
                markersize=8, markeredgecolor=PAPER, label=shown(labels[number - 1]),
            )  # fmt: skip
            handles += point
            _beside(axes, offer.read, offer.error.estimate, str(number), number)
        axes.set_xlabel("C: dense bytes / bytes read")
        axes.set_ylabel("recipe error, mean relative L2")
        legend(figure, handles)

    best_named = "; ".join(f"{offer.name}: error {offer.error.estimate:.4f} at C = {offer.read:.2f}" for offer in named)
    return Chart(
        "recipe-error",
        "Recipe error against C: the Pareto front, numbered, and the recipes behind it",
        f"Recipe error against C of {len(shown_offers)} recipes. On the Pareto front: {best_named}.",
        draw,
        height=290 + legend_height(labels),
    )


def loss_charts(evaluations: Sequence[Evaluation]) -> Iterator[Chart]:
    """Yield the KL divergence and the change of perplexity of each model against C, a line for each context."""
    models: dict[str, list[Loss]] = {}
    several = len({evaluation.method for evaluation in evaluations}) > 1
    for evaluation in evaluations:
        losses = [loss for loss in evaluation.caches if loss.read is not None]
        if losses:
            calibrated = "calibrated" if evaluation.calibration else "not calibrated"
            # No line joins what was evaluated on other texts or in another dtype.
            method = f", {evaluation.method}" if several else ""
            models.setdefault(f"{evaluation.model}, {calibrated}{method}", []).extend(losses)
    for number, (model, losses) in enumerate(models.items(), 1):
        yield _loss(f"kl-{number}", model, losses, "KL divergence, nats a token", True)
        yield _loss(f"perplexity-{number}", model, losses, "change of perplexity, %", False)


def _loss(name: str, model: str, losses: Sequence[Loss], label: str, logarithmic: bool) -> Chart:
    contexts = list(dict.fromkeys(loss.context for loss in losses))
    labels = [f"{context} tokens" for context in contexts]

    def value(loss: Loss) -> IntervalEstimate:
        if not logarithmic:
            return loss.ppl_percent
        low, high = bounds(loss.kl)
        return IntervalEstimate(*(max(LEAST_KL, bound) for bound in (loss.kl.estimate, low, high)))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        log_axis(axes.xaxis, *span([loss.read or 1 for loss in losses], 1.25), 2)
        if logarithmic:
            log_axis(axes.yaxis, *span([bound for loss in losses for bound in bounds(value(loss))], 1.8))
        else:
            plain_axis(axes.yaxis)
            axes.axhline(0, color=INK, linewidth=1)
        handles = []
        for place, context in enumerate(contexts):
            of = sorted((loss for loss in losses if loss.context == context), key=lambda loss: loss.read or 0)
            figures = [value(loss) for loss in of]
            across, up = [loss.read or 1 for loss in of], [figure.estimate for figure in figures]
            look = {"color": hue(place), "marker": marker(place), "linestyle": line(place * len(HUES))}
            handles.append(axes.errorbar(across, up, yerr=bars(figures), capsize=3, label=labels[place], **look))
            for x, y, loss in zip(across, up, of, strict=True):
                if len(losses) <= MOST_NAMED:
                    _beside(axes, x, y, shown(loss.cache, 20), place)
        axes.set_xlabel("C: dense bytes / bytes read")
        axes.set_ylabel(label)
        legend(figure, handles)

    measured = [(loss, loss.kl if logarithmic else loss.ppl_percent) for loss in losses[:MOST_NAMED]]
    summary = "; ".join(f"{loss.cache} at {loss.context} tokens {figure.estimate:.2g}" for loss, figure in measured)
    return Chart(
        name,
        f"{label.partition(',')[0].capitalize() if not logarithmic else 'KL divergence'} against C: {shown(model)}",
        f"{label} of {model} against C, with 95 % intervals over windows: {summary}.",
        draw,
        height=290 + legend_height(labels),
    )


def _beside(axes: Any, x: float, y: float, text: str, number: int) -> None:
    """Write a short text at a point, above left and below right of it in turns: a rising curve touches neither."""
    above = number % 2 == 0
    look = {"ha": "right", "va": "bottom", "xytext": (-5, 4)} if above else {"ha": "left", "va": "top", "xytext": (6, -5)}
    axes.annotate(text, (x, y), textcoords="offset points", fontsize=9, color=INK, **look)


def needle_charts(evaluations: Sequence[Evaluation]) -> tuple[list[Chart], int]:
    """Return a heat map of pass keys found for each model, and how many rows were too many to draw."""
    models: dict[str, list[Needle]] = {}
    for evaluation in evaluations:
        if evaluation.needles:
            models.setdefault(evaluation.model, []).extend(evaluation.needles)
    charts = [_needle(f"needle-{i}", model, needles[:MOST_ROWS]) for i, (model, needles) in enumerate(models.items(), 1)]
    return charts, sum(max(0, len(needles) - MOST_ROWS) for needles in models.values())


def _needle(name: str, model: str, needles: Sequence[Needle]) -> Chart:
    depths = sorted({depth for needle in needles for depth in needle.answers})
    # More depths than fit are taken together.
    columns = [depths[i * len(depths) // _MOST_DEPTHS : (i + 1) * len(depths) // _MOST_DEPTHS] for i in range(_MOST_DEPTHS)]
    columns = [column for column in columns if column]

    def draw(figure: Any) -> None:
        from matplotlib.patches import Rectangle

        axes = figure.add_subplot()
        axes.grid(visible=False)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(needles), 0)
        for row, needle in enumerate(needles):
            for column, of in enumerate(columns):
                counts = [needle.answers[depth] for depth in of if depth in needle.answers]
                hits, tried = sum(right for right, _ in counts), sum(count for _, count in counts)
                share = hits / tried if tried else 0
                cell = Rectangle((column + 0.03, row + 0.04), 0.94, 0.92, facecolor=HUES[0], alpha=0.06 + 0.5 * share)
                axes.add_patch(cell)
                axes.text(column + 0.5, row + 0.5, f"{hits}/{tried}" if tried else "", ha="center", va="center", fontsize=8.5)
        axes.set_yticks(
            [row + 0.5 for row in range(len(needles))], [shown(f"{needle.tokens} · {needle.cache}", 28) for needle in needles]
        )
        axes.set_xticks([i + 0.5 for i in range(len(columns))], [f"{100 * sum(of) / len(of):.0f}" for of in columns])
        axes.tick_params(length=0)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.set_xlabel("depth of the pass key, % of the prompt")
        axes.set_ylabel("tokens · cache")

    counted = "; ".join(f"{needle.cache} in {needle.tokens} tokens {needle.hits} of {needle.tried}" for needle in needles)
    return Chart(
        name,
        f"Pass keys found: {shown(model)}",
        f"Pass keys found by {model}: {counted}.",
        draw,
        height=60 + 26 * len(needles),
    )
