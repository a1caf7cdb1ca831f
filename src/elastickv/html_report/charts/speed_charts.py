"""Speed-up against C, and the roofline."""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from elastickv.html_report.charts.style import (
    INK,
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
    shown,
    span,
)
from elastickv.html_report.method_labels import step_label
from elastickv.html_report.report_data import IntervalEstimate, Step

MANY = 120  # with more points than this intervals are not drawn: the table has them
_DENSE, _CEILINGS = -1, "measured ceilings"
Points = Sequence[tuple[float, IntervalEstimate]]


def family(recipe: str) -> str:
    """Return what kind of recipe it is: its formats and its selection, without their numbers."""
    parts = [part for part in recipe.split(",") if part]
    formats = [part for part in parts if "=" not in part and part not in ("reuse", "pages")]
    formats += [part for part in parts if part.partition("=")[0] in ("k", "v")]
    chosen = [part.partition("=")[0] for part in parts if part.partition("=")[0] in ("pages", "stride", "reuse")]
    return " + ".join(["dense as recipe" if recipe == "dense" else ",".join(formats) or recipe, *chosen])


def families(steps: Sequence[Step]) -> list[str]:
    """Return the families that occur, those of most results first."""
    names = [family(step.what) for step in steps]
    return sorted(dict.fromkeys(names), key=lambda name: (-names.count(name), name))


def speedup_charts(steps: Sequence[Step]) -> Iterator[Chart]:
    """Yield the speed-up of a decode step against C on each device, with the line 'C = ideal'."""
    measured = [step for step in steps if step.speedup is not None]
    devices = list(dict.fromkeys(step.provenance.device for step in measured))
    for number, device in enumerate(devices, 1):
        yield _speedup(f"speedup-{number}", device, [step for step in measured if step.provenance.device == device])


def _speedup(name: str, device: str, steps: Sequence[Step]) -> Chart:
    measured = [(step, step.read or step.compress, step.speedup) for step in steps if step.speedup is not None]
    kinds = [_kind(step, steps) for step, *_ in measured]
    present = sorted(dict.fromkeys(kinds), key=lambda kind: (-kinds.count(kind), kind))
    guides = ["C = ideal", "as fast as dense"]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        ratios = [ratio for _, ratio, _ in measured]
        values = [bound for *_, speedup in measured for bound in bounds(speedup)]
        low, high = span([*ratios, 1.0], 1.15)
        bottom, top = span([*values, 1.0, max(ratios)], 1.15)
        log_axis(axes.xaxis, low, high, 2)
        log_axis(axes.yaxis, bottom, top, 2)
        ends = [max(low, bottom), min(high, top)]
        handles = axes.plot(ends, ends, color=INK, linestyle=(0, (5, 2)), linewidth=1.3, label=guides[0])
        handles += axes.plot([low, high], [1, 1], color=MUTED, linewidth=1.2, linestyle=":", label=guides[1])
        for place, kind in enumerate(present):
            points = [(ratio, speedup) for (_, ratio, speedup), own in zip(measured, kinds, strict=True) if own == kind]
            handles.append(_points(axes, points, place, kind, len(measured) <= MANY))
        axes.set_xlabel("C: dense bytes / bytes read")
        axes.set_ylabel("speed-up: dense time / elastic time")
        legend(figure, handles)

    _, ratio, best = max(measured, key=lambda point: point[2].estimate)
    return Chart(
        name,
        f"Speed-up of a decode step: {shown(device)}",
        f"Speed-up against C for {len(measured)} results on {device}; the largest is {best.estimate:.2f} at C = {ratio:.2f}. "
        "The dashed line is C = ideal.",
        draw,
        height=300 + legend_height([*guides, *present]),
    )


def _kind(step: Step, steps: Sequence[Step]) -> str:
    """Return the family of a step's recipe, and how it was measured where others were measured in another way."""
    return ", ".join(filter(None, [family(step.what), step_label(step, steps)]))


def roofline_charts(steps: Sequence[Step]) -> Iterator[Chart]:
    """Yield the roofline of each device: performance against arithmetic intensity under the measured ceilings."""
    devices = list(dict.fromkeys(step.provenance.device for step in steps if step.roofline))
    for number, device in enumerate(devices, 1):
        of = [step for step in steps if step.roofline and step.provenance.device == device]
        yield _roofline(f"roofline-{number}", device, of)


def _roofline(name: str, device: str, steps: Sequence[Step]) -> Chart:
    read = median(step.read_gbs for step in steps if step.read_gbs)
    flops = median(step.flops_gflops for step in steps if step.flops_gflops)
    present = families(steps)
    scale, unit = (1e-3, "TFLOP/s") if flops > 1e4 else (1.0, "GFLOP/s")
    measured = f"{read:.4g} GB/s, {scale * flops:.4g} {unit}"

    def reached(of: Sequence[Step], contender: str) -> Points:
        points = [step.roofline[contender] for step in of]
        return [(point.intensity_flop_per_byte, IntervalEstimate(scale * point.achieved_gflops)) for point in points]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        points = [point for step in steps for point in step.roofline.values()]
        left, right = span([*(point.intensity_flop_per_byte for point in points), flops / read], 2)
        log_axis(axes.xaxis, left, right)
        log_axis(axes.yaxis, *span([scale * value for value in (*(point.achieved_gflops for point in points), flops)], 1.8))
        roof = [scale * value for value in (left * read, flops, flops)]
        handles = axes.plot([left, flops / read, right], roof, color=INK, label=_CEILINGS)
        handles.append(_points(axes, reached(steps, "dense"), _DENSE, "dense"))
        for place, kind in enumerate(present):
            of = [step for step in steps if family(step.what) == kind]
            handles.append(_points(axes, reached(of, "elastic"), place, kind))
        axes.set_xlabel("arithmetic intensity, FLOP / byte")
        axes.set_ylabel(f"performance, {unit}")
        legend(figure, handles)

    best = max(step.roofline["elastic"].score for step in steps)
    return Chart(
        name,
        f"{shown(device)}: {measured}",
        f"Performance against arithmetic intensity of {len(steps)} results on {device}, under {measured} as measured. The "
        f"elastic step that comes closest reaches {100 * best:.0f} % of what is attainable.",
        draw,
        height=300 + legend_height([_CEILINGS, "dense", *present]),
    )


def _points(axes: Any, points: Points, place: int, label: str, with_bars: bool = False) -> Any:
    """Draw points of one family, with their intervals or without, and return the legend's handle."""
    color = INK if place == _DENSE else hue(place)
    across, estimates = [x for x, _ in points], [one for _, one in points]
    if with_bars:
        axes.errorbar(across, [one.estimate for one in estimates], yerr=bars(estimates), fmt="none", ecolor=color, capsize=3)
    few = len(points) <= MANY
    return axes.plot(
        across,
        [one.estimate for one in estimates],
        linestyle="none",
        marker=marker(place + 1),
        color=color,
        markerfacecolor=PAPER if place == _DENSE else color,
        markeredgecolor=color if place == _DENSE else PAPER,
        markeredgewidth=1.2 if place == _DENSE else 0.6,
        markersize=7 if few else 4.5,
        alpha=1 if few else 0.7,
        label=shown(label),
    )[0]
