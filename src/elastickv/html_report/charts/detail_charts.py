"""Latency, memory, and whole models."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from elastickv.html_report.charts.style import (
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
    plain_axis,
    rows_axes,
    shown,
    span,
)
from elastickv.html_report.report_data import BENCH, IntervalEstimate, ModelRun, Step

MOST_BARS = 12
MOST_MODELS = 6
_WIDE = 8.0  # from this ratio of the longest to the shortest time on the axis is logarithmic
# Parts of what a step reads, as they are drawn: what a file calls them, in order.
_PARTS = (
    ("codes", ("codes",)),
    ("scales", ("scales",)),
    ("scoring, lists", ("scoring", "lists")),
    ("sinks, window", ("exact",)),
    ("cached output", ("cached",)),
)


def latency_chart(name: str, title: str, series: Mapping[str, Sequence[float]], what: str) -> Chart:
    """Return the share of samples that took no longer than a time, a curve for each contender, p50 and p99 marked.

    Parameters
    ----------
    series : samples in milliseconds, at least two each.
    what : what a sample is of.
    """
    curves = {label: np.sort(np.asarray(samples, float)) for label, samples in series.items()}
    scale, unit = (1e3, "µs") if max(times[-1] for times in curves.values()) < 1 else (1.0, "ms")
    labels = [
        f"{label}: p50 {scale * np.quantile(times, 0.5):.4g}, p99 {scale * np.quantile(times, 0.99):.4g} {unit}"
        for label, times in curves.items()
    ]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        ends = [scale * bound for times in curves.values() for bound in (times[0], times[-1])]
        if max(ends) / min(ends) > _WIDE:
            log_axis(axes.xaxis, *span(ends, 1.1))
        else:
            plain_axis(axes.xaxis)
            margin = 0.06 * (max(ends) - min(ends)) or 0.05 * max(ends)
            axes.set_xlim(min(ends) - margin, max(ends) + margin)
        plain_axis(axes.yaxis)
        axes.set_ylim(0, 104)
        handles = []
        for place, (label, times) in enumerate(curves.items()):
            look = {"color": hue(place) if label.startswith("elastic") else INK, "linestyle": line(5 * place)}
            axes.step(scale * times, 100 * np.arange(1, len(times) + 1) / len(times), where="post", **look)
            marks = [scale * np.quantile(times, q) for q in (0.5, 0.99)]
            look |= {"marker": marker(place), "markeredgecolor": PAPER}
            axes.plot(marks, [50, 99], **(look | {"linestyle": "none"}))
            handles += axes.plot([], [], label=shown(labels[place]), **look)
        axes.set_xlabel(f"{unit} {what}")
        axes.set_ylabel("samples that took no longer, %")
        legend(figure, handles)

    return Chart(
        name,
        title,
        f"Distribution of {what}: {'; '.join(labels)}.",
        draw,
        height=280 + legend_height(labels),
    )


def memory_chart(steps: Sequence[Step]) -> Chart | None:
    """Return what a step reads and what is stored as shares of dense, by part; of each recipe at its longest context."""
    longest: dict[str, Step] = {}
    for step in sorted(steps, key=lambda step: step.context):
        if step.memory is not None:
            longest[step.what] = step
    bars_shown = sorted(longest.values(), key=lambda step: -(step.read or 0))[:MOST_BARS]
    if not bars_shown:
        return None
    parts = [name for name, keys in _PARTS if any(_share(step, keys) >= 0.002 for step in bars_shown)]

    def draw(figure: Any) -> None:
        axes = rows_axes(figure, [f"{step.context}: {step.what}" for step in bars_shown])
        handles = []
        for row, step in enumerate(bars_shown):
            memory, before = step.memory, 0.0
            for place, (name, keys) in enumerate(_PARTS):
                share = 100 * _share(step, keys)
                if name in parts:
                    look = {"color": hue(place), "edgecolor": PAPER, "hatch": ("", "////", "....", "", "xxxx")[place]}
                    bar = axes.barh(row, share, 0.34, before, label=name if row == 0 else None, linewidth=0.8, **look)
                    handles += [bar] if row == 0 else []
                before += share
            if memory:
                share = 100 * memory.stored_bytes / memory.dense_bytes_per_step
                stored = axes.plot(share, row, marker="|", color=INK, markersize=15,
                                   markeredgewidth=2, linestyle="none", label="stored")  # fmt: skip
                handles += stored if row == 0 else []
        plain_axis(axes.xaxis)
        axes.set_xlim(left=0)
        axes.set_xlabel("% of the bytes that dense reads in 16 bit")
        legend(figure, handles)

    said = "; ".join(f"{step.what} reads 1/{step.read:.2f} and stores 1/{step.stored:.2f}" for step in bars_shown)
    return Chart(
        "memory",
        "Bytes read in a step, by part, and bytes stored",
        f"Bytes as shares of dense: {said}.",
        draw,
        height=60 + 36 * len(bars_shown) + legend_height([*parts, "stored"]),
    )


def _share(step: Step, keys: Sequence[str]) -> float:
    """Return what the parts of these names are of the bytes that dense reads."""
    return sum(step.read_bytes.get(key, 0.0) for key in keys) / step.memory.dense_bytes_per_step if step.memory else 0.0


def model_charts(models: Sequence[ModelRun]) -> Iterator[Chart]:
    """Yield time per decoded token of each model, a row for each cache at each context and batch."""
    groups: dict[str, list[ModelRun]] = {}
    for model in models:
        # What different programs measured is never on one axis: `run` times one text once.
        by = "" if model.program == BENCH else f" ({model.program})"
        groups.setdefault(f"{model.model} on {model.provenance.device}{by}", []).append(model)
    for number, (title, runs) in enumerate(list(groups.items())[:MOST_MODELS], 1):
        rows = [
            (f"{cache.name}: {run.context} tokens × {run.batch}", cache.name, cache.step_ms)
            for run in sorted(runs, key=lambda run: (run.batch or 0, run.context or 0))
            for cache in run.caches
            if cache.step_ms is not None
        ]
        if rows:
            yield _model(f"model-{number}", title, rows[: 2 * MOST_BARS])


def _model(name: str, title: str, rows: Sequence[tuple[str, str, IntervalEstimate]]) -> Chart:
    caches = list(dict.fromkeys(cache for _, cache, _ in rows))

    def draw(figure: Any) -> None:
        axes = rows_axes(figure, [label for label, *_ in rows])
        log_axis(axes.xaxis, *span([bound for *_, time in rows for bound in bounds(time)], 1.3))
        for row, (_, cache, time) in enumerate(rows):
            place = caches.index(cache)
            color = hue(0) if cache == "elastic" else INK
            look = {"color": color, "marker": marker(place), "markerfacecolor": color if cache == "elastic" else PAPER}
            axes.errorbar([time.estimate], [row], xerr=bars([time]), capsize=3, **look)
        axes.set_xlabel("ms per decoded token, whole model")

    times = "; ".join(f"{label} {time.estimate:.2f} ms" for label, _, time in rows)
    return Chart(
        name,
        f"Time per token: {shown(title)}",
        f"Milliseconds per decoded token of {title}: {times}; a logarithmic axis, bars are 95 % intervals.",
        draw,
        height=55 + 34 * len(rows),
    )
