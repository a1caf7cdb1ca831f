"""Time per step against context, a chart for each shape."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
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
    line,
    log_axis,
    marker,
    rows_axes,
    shown,
    span,
)
from elastickv.html_report.method_labels import MeasuredTime, labeled_series
from elastickv.html_report.report_data import ContenderTime, IntervalEstimate, Step

MOST_CHARTS = 6
MOST_SERIES = 10
Series = Mapping[str, Sequence[tuple[int, IntervalEstimate]]]


def time_charts(steps: Sequence[Step]) -> tuple[list[Chart], list[str]]:
    """Return a chart for each shape, those of most contexts first, and what could not be drawn because it is too much."""
    groups: dict[tuple[str, str], list[Step]] = defaultdict(list)
    for step in steps:
        groups[(step.provenance.device, step.shape)].append(step)
    several = len({device for device, _ in groups}) > 1
    ordered = sorted(groups.items(), key=lambda group: (-len({step.context for step in group[1]}), -len(group[1])))
    charts, left = [], [f"{shape} on {device}" for (device, shape), _ in ordered[MOST_CHARTS:]]
    for number, ((device, shape), group) in enumerate(ordered[:MOST_CHARTS], 1):
        title = f"{shape}, {device}" if several else shape
        series = _series(group)
        names = list(series)
        left += [f"{name} of {title}" for name in names[MOST_SERIES:]]
        drawn = {name: series[name] for name in names[:MOST_SERIES]}
        draw = _lines if len({step.context for step in group}) > 1 else _dots
        charts.append(draw(f"time-{number}", title, drawn))
    return charts, left


def _series(steps: Sequence[Step]) -> Series:
    """Return times by label and context: dense, each requested recipe, and the fastest variant of each peer package."""
    times: dict[str, list[MeasuredTime]] = defaultdict(list)

    def add(label: str, step: Step, time: IntervalEstimate, variant: str) -> None:
        times[label].append(MeasuredTime(step.context, time, step.method, variant))

    for step in steps:
        own = [contender for contender in step.contenders if contender.timing.kind == "dense"]
        if own:
            fastest = min(own, key=lambda contender: contender.time_ms.estimate)
            add("dense, ours", step, fastest.time_ms, fastest.timing.name)
        elif step.dense_ms is not None and not step.contenders:
            add("dense, of the original", step, IntervalEstimate(step.dense_ms), "")
        elastic = [contender.time_ms for contender in step.contenders if contender.timing.name == "elastic"]
        time = elastic[0] if elastic else IntervalEstimate(step.elastic_ms)
        add(f"elastic {step.requested_label}", step, time, step.what)
        for label, peer in _fastest_peers(step.contenders).items():
            add(label, step, peer.time_ms, f"{peer.timing.name} {peer.timing.version}")
    by_label: dict[str, dict[int, list[IntervalEstimate]]] = {}
    for label, measured in times.items():
        by_label |= labeled_series(label, measured)

    def order(label: str) -> tuple[bool, bool, int]:
        return not label.startswith("dense"), label.startswith("elastic"), -len(by_label[label])

    names = sorted(by_label, key=order)
    return {name: [(context, _joined(times)) for context, times in sorted(by_label[name].items())] for name in names}


def _fastest_peers(contenders: Sequence[ContenderTime]) -> dict[str, ContenderTime]:
    """Return the fastest variant of each package and width: there are a dozen."""
    fastest: dict[str, ContenderTime] = {}
    for contender in contenders:
        if contender.timing.kind == "peer":
            words = contender.timing.name.split("-")
            package = "-".join(words[: 2 if words[0] in ("torch", "flex") else 1])
            label = f"{package} {contender.timing.dtype}"
            if label not in fastest or contender.time_ms.estimate < fastest[label].time_ms.estimate:
                fastest[label] = contender
    return fastest


def _joined(times: Sequence[IntervalEstimate]) -> IntervalEstimate:
    """Return several runs' time as one: their median, from the lowest bound to the highest."""
    ends = [bound for time in times for bound in bounds(time)]
    return IntervalEstimate(median(time.estimate for time in times), min(ends), max(ends))


def _look(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return how each series is drawn: dense in ink, recipes in colors, peers in gray; hollow markers are not ours."""
    looks: dict[str, dict[str, Any]] = {}
    recipes = peers = 0
    for place, name in enumerate(names):
        own, dense = name.startswith("elastic"), name.startswith("dense")
        color = hue(recipes) if own else INK if dense else MUTED
        style = line(recipes) if own else "-" if dense else ((0, (2, 2)), (0, (6, 2, 1, 2)), (0, (1, 1)))[peers % 3]
        recipes, peers = recipes + own, peers + (not own and not dense)
        face = color if own or dense else PAPER
        looks[name] = {"color": color, "linestyle": style, "marker": marker(place), "markerfacecolor": face}
    return looks


def _unit(series: Series) -> tuple[float, str]:
    slowest = max(time.estimate for points in series.values() for _, time in points)
    return (1e3, "µs") if slowest < 1 else (1.0, "ms")


def _lines(name: str, title: str, series: Series) -> Chart:
    contexts = sorted({context for points in series.values() for context, _ in points})
    scale, unit = _unit(series)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        log_axis(axes.xaxis, *span(contexts, 1.3), 2)
        if len(contexts) <= 5:
            axes.set_xticks(contexts)
        ends = [scale * bound for points in series.values() for _, time in points for bound in bounds(time)]
        log_axis(axes.yaxis, *span(ends, 1.3))
        handles = []
        for label, look in _look(list(series)).items():
            times = [time for _, time in series[label]]
            across, up = [context for context, _ in series[label]], [scale * time.estimate for time in times]
            handles.append(axes.errorbar(across, up, yerr=bars(times, scale), capsize=3, label=shown(label), **look))
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(f"{unit} per decode step of one layer")
        legend(figure, handles)

    return Chart(
        name,
        f"Time per step against context: {title}",
        f"Time per decode step of one layer against context, {title}: {', '.join(series)}, from {contexts[0]} to "
        f"{contexts[-1]} tokens; both axes logarithmic, bars are 95 % intervals.",
        draw,
        height=290 + legend_height(list(series)),
    )


def _dots(name: str, title: str, series: Series) -> Chart:
    """Return the chart of a shape that was measured at one context only: a row for each series."""
    ((context, _), *_) = next(iter(series.values()))
    scale, unit = _unit(series)

    def draw(figure: Any) -> None:
        axes = rows_axes(figure, list(series))
        ends = [scale * bound for points in series.values() for _, time in points for bound in bounds(time)]
        log_axis(axes.xaxis, *span(ends, 1.3))
        for row, (label, look) in enumerate(_look(list(series)).items()):
            time = series[label][0][1]
            axes.errorbar([scale * time.estimate], [row], xerr=bars([time], scale), capsize=3, **look)
        axes.set_xlabel(f"{unit} per decode step of one layer, {context} tokens")

    return Chart(
        name,
        f"Time per step at {context} tokens: {title}",
        f"Time per decode step of one layer at {context} tokens, {title}: {', '.join(series)}; a logarithmic axis, bars are "
        "95 % intervals.",
        draw,
        height=55 + 36 * len(series),
    )
