"""Charts of speed: the roofline, speed-up against C, time per step against context."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from elastickv.reports.page.facts import Contender, Estimate, Step
from elastickv.reports.page.style import (
    INK,
    MUTED,
    PAPER,
    Chart,
    hue,
    legend,
    line,
    log_axis,
    marker,
    number,
    shown,
    span,
)

MOST_PANELS = 6
MOST_SERIES = 8
MOST_BARS = 120  # beyond this many points their intervals are a thicket, and stand in the table


def family(recipe: str) -> str:
    """Return what kind of recipe it is: its formats and its selection, without their numbers."""
    parts = [part for part in recipe.split(",") if part]
    formats = [part for part in parts if "=" not in part and part not in ("reuse", "pages")]
    formats += [part for part in parts if part.partition("=")[0] in ("k", "v")]
    chosen = [part.partition("=")[0] for part in parts if part.partition("=")[0] in ("pages", "stride", "reuse")]
    return " + ".join([",".join(formats) or recipe, *chosen])


def families(steps: Sequence[Step]) -> list[str]:
    """Return the families that occur, those of most results first."""
    found = [family(step.what) for step in steps]
    return sorted(dict.fromkeys(found), key=lambda name: (-found.count(name), name))


def speedup_chart(steps: Sequence[Step]) -> Chart | None:
    """Return the speed-up of a decode step against C, with the line 'C = ideal'; None where nothing tells both."""
    told = [step for step in steps if step.speedup is not None and (step.read or step.compress)]
    if not told:
        return None

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        ratios = [step.read or step.compress for step in told]
        values = [bound for step in told for bound in _bounds(step.speedup)]
        most = max(*ratios, *values, 1.0)
        low, high = span([*ratios, most], 1.15)
        bottom, top = span([*values, 1.0, most], 1.15)
        log_axis(axes.xaxis, low, high, 2)
        log_axis(axes.yaxis, bottom, top, 2)
        ends = [max(low, bottom), min(high, top)]
        handles = axes.plot(ends, ends, color=INK, linestyle=(0, (5, 2)), linewidth=1.3, label="C = ideal")
        handles += axes.plot([low, high], [1, 1], color=MUTED, linewidth=1, linestyle=":", label="as fast as dense")
        for place, name in enumerate(families(told)):
            points = [step for step in told if family(step.what) == name]
            handles.append(
                _points(
                    axes,
                    [(step.read or step.compress, step.speedup) for step in points],
                    place,
                    name,
                    len(told) <= MOST_BARS,
                    not any(step.recipe for step in points),
                )
            )
        axes.set_xlabel("C: dense bytes / bytes read")
        axes.set_ylabel("speed-up: dense time / elastic time")
        legend(figure, handles)

    best = max(told, key=lambda step: step.speedup.estimate if step.speedup else 0)
    rows = -(-(len(families(told)) + 2) // 2)
    return Chart(
        "speedup",
        "Speed-up of a decode step against C",
        f"Speed-up against C for {len(told)} results; the largest is {best.speedup.estimate if best.speedup else 0:.2f} at "
        f"C = {best.read or best.compress:.2f}. The dashed line is C = ideal.",
        draw,
        height=330 + 17 * rows,
    )


def roofline_charts(steps: Sequence[Step]) -> Iterator[Chart]:
    """Yield the roofline of each device: performance against arithmetic intensity under the measured ceilings."""
    devices = list(dict.fromkeys(step.told.device for step in steps if step.roofline))
    for place, device in enumerate(devices):
        yield _roofline(f"roofline-{place + 1}" if place else "roofline", device, [s for s in steps if s.told.device == device])


def _roofline(name: str, device: str, steps: Sequence[Step]) -> Chart:
    told = [step for step in steps if step.roofline]
    read = median([step.read_gbs for step in told if step.read_gbs])
    flops = median([step.flops_gflops for step in told if step.flops_gflops])
    present = families(told)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        points = [point for step in told for point in step.roofline.values()]
        left, right = span([*(point.intensity for point in points), flops / read], 2)
        bottom, top = span([*(point.gflops for point in points), flops], 1.8)
        log_axis(axes.xaxis, left, right)
        log_axis(axes.yaxis, bottom, top)
        ridge = flops / read
        handles = axes.plot(
            [left, ridge, right], [left * read, flops, flops], color=INK, label=f"measured: {number(round(read))} GB/s, "
            f"{number(float(f'{flops / 1e3:.3g}'))} TFLOP/s",
        )  # fmt: skip
        dense = [Estimate(step.roofline["dense"].gflops) for step in told]
        handles.append(_points(axes, _at("dense", told, dense), -1, "dense", False, False))
        for place, kind in enumerate(present):
            of = [step for step in told if family(step.what) == kind]
            reached = [Estimate(step.roofline["elastic"].gflops) for step in of]
            handles.append(_points(axes, _at("elastic", of, reached), place, kind, False, False))
        axes.set_xlabel("arithmetic intensity, FLOP / byte")
        axes.set_ylabel("performance, GFLOP/s")
        legend(figure, handles)

    best = max(told, key=lambda step: step.roofline["elastic"].score)
    return Chart(
        name,
        f"Roofline: {shown(device)}",
        f"Performance against arithmetic intensity of {len(told)} results on {device}, under {read:.0f} GB/s and "
        f"{flops / 1e3:.3g} TFLOP/s as measured. The elastic step that is closest reaches "
        f"{100 * best.roofline['elastic'].score:.0f} % of what is attainable.",
        draw,
        height=330 + 17 * -(-(len(present) + 2) // 2),
    )


def _at(side: str, steps: Sequence[Step], reached: Sequence[Estimate]) -> list[tuple[float, Estimate | None]]:
    return [(step.roofline[side].intensity, value) for step, value in zip(steps, reached, strict=True)]


def time_charts(steps: Sequence[Step]) -> tuple[list[Chart], list[str]]:
    """Return time per step against context, a chart for each shape, and which shapes have none because there are too many."""
    groups: dict[tuple[str, str], list[Step]] = defaultdict(list)
    for step in steps:
        groups[(step.told.device, step.shape)].append(step)
    several = len({device for device, _ in groups}) > 1

    def worth(item: tuple[tuple[str, str], list[Step]]) -> tuple[int, int]:
        return -len({step.context for step in item[1]}), -len(item[1])

    ordered = sorted(groups.items(), key=worth)
    charts = [
        _time(f"time-{place}", f"{shape}, {device}" if several else shape, group)
        for place, ((device, shape), group) in enumerate(ordered[:MOST_PANELS], 1)
    ]
    return charts, [f"{shape} on {device}" for (device, shape), _ in ordered[MOST_PANELS:]]


def _time(name: str, title: str, steps: Sequence[Step]) -> Chart:
    series = _series(steps)
    elastic = [label for label in series if label.startswith("elastic")]
    kept = [label for label in series if label not in elastic[MOST_SERIES:]]
    contexts = sorted({step.context for step in steps})

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        times = [bound for label in kept for _, time in series[label] for bound in _bounds(time)]
        scale, unit = (1e3, "µs") if max(times) < 1 else (1.0, "ms")
        left, right = span(contexts, 1.3)
        log_axis(axes.xaxis, left, right, 2)
        if len(contexts) <= 5:
            axes.set_xticks(contexts)
        log_axis(axes.yaxis, *span([scale * time for time in times], 1.3))
        handles, hues = [], 0
        for label in kept:
            own = label.startswith("elastic")
            colour = hue(hues) if own else INK if label.startswith("dense") else MUTED
            style: Any = line(hues) if own else "-" if label.startswith("dense") else (0, (2, 2))
            place = kept.index(label)
            points = [(context, time) for context, time in series[label]]
            bars = [
                [scale * abs(time.estimate - bound) for _, time in points for bound in [_bounds(time)[end]]] for end in (0, -1)
            ]
            handles.append(
                axes.errorbar(
                    [context for context, _ in points],
                    [scale * time.estimate for _, time in points],
                    yerr=bars,
                    color=colour,
                    linestyle=style,
                    marker=marker(place),
                    markerfacecolor=colour if own else PAPER,
                    capsize=3,
                    label=shown(label),
                )
            )
            hues += own
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(f"{unit} per decode step of one layer")
        axes.set_title(shown(title))
        legend(figure, handles)

    return Chart(
        name,
        f"Time per step against context: {title}",
        f"Milliseconds per decode step of one layer against context, {title}: {', '.join(kept)}, at "
        f"{', '.join(map(str, contexts[:8]))} tokens; both axes logarithmic, bars are 95 % intervals.",
        draw,
        height=300 + 17 * -(-len(kept) // 2),
    )


def _series(steps: Sequence[Step]) -> dict[str, list[tuple[int, Estimate]]]:
    """Return times by series and context: dense, each recipe as asked for, and of each package of peers its fastest."""
    found: dict[str, dict[int, list[Estimate]]] = defaultdict(lambda: defaultdict(list))
    for step in steps:
        own = [contender for contender in step.contenders if contender.kind == "dense"]
        if own:
            fastest = min(own, key=lambda contender: contender.time_ms.estimate)
            found["dense, ours"][step.context].append(fastest.time_ms)
        elif step.dense_ms is not None and not step.contenders:
            found["dense, the original's"][step.context].append(Estimate(step.dense_ms))
        mine = next((c.time_ms for c in step.contenders if c.name == "elastic"), Estimate(step.elastic_ms))
        found[f"elastic {step.asked}"][step.context].append(mine)
        for label, peer in _fastest_peers(step.contenders).items():
            found[label][step.context].append(peer.time_ms)
    order = sorted(
        found, key=lambda label: (not label.startswith("dense"), not label.startswith("elastic"), -len(found[label]))
    )
    return {label: [(context, _joined(times)) for context, times in sorted(found[label].items())] for label in order}


def _fastest_peers(contenders: Sequence[Contender]) -> dict[str, Contender]:
    """Return of each package and width the fastest variant: there are a dozen."""
    found: dict[str, Contender] = {}
    for contender in contenders:
        if contender.kind == "peer":
            package = (
                "-".join(contender.name.split("-")[:2])
                if contender.name.startswith(("torch-", "flex-"))
                else contender.name.split("-")[0]
            )
            label = f"{package} {contender.dtype}"
            if label not in found or contender.time_ms.estimate < found[label].time_ms.estimate:
                found[label] = contender
    return found


def _joined(times: Sequence[Estimate]) -> Estimate:
    """Return several runs' time as one: their median, from the lowest bound to the highest."""
    bounds = [bound for time in times for bound in _bounds(time)]
    return Estimate(median(time.estimate for time in times), min(bounds), max(bounds))


def _bounds(found: Estimate | None) -> tuple[float, float]:
    if found is None:
        return (1.0, 1.0)
    return (found.low, found.high) if found.low is not None and found.high is not None else (found.estimate, found.estimate)


def _points(
    axes: Any, points: Sequence[tuple[float, Estimate | None]], place: int, label: str, bars: bool, hollow: bool
) -> Any:
    """Draw points, with their intervals if `bars`; `place` -1 is dense."""
    colour = INK if place < 0 else hue(place)
    told = [(x, found) for x, found in points if found is not None]
    if bars:
        lengths = [[abs(found.estimate - _bounds(found)[end]) for _, found in told] for end in (0, 1)]
        axes.errorbar([x for x, _ in told], [f.estimate for _, f in told], yerr=lengths, fmt="none", ecolor=colour, capsize=3)
    return axes.plot(
        [x for x, _ in told],
        [found.estimate for _, found in told],
        linestyle="none",
        marker="o" if place < 0 else marker(place + 1),
        color=colour,
        markerfacecolor=PAPER if hollow or place < 0 else colour,
        markeredgecolor=colour if hollow or place < 0 else PAPER,
        markeredgewidth=1.2 if hollow or place < 0 else 0.7,
        markersize=7 if len(told) <= MOST_BARS else 4.5,
        alpha=1 if len(told) <= MOST_BARS else 0.7,
        label=shown(label),
    )[0]
