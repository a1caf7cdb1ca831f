"""The latency of each token of an inference cycle, in order: pages that leave the window and anchors stand out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elastickv.html_report.charts.style import INK, Chart, hue, legend, legend_height, log_axis, plain_axis, shown, span

_WIDE = 8.0  # from this ratio of the longest to the shortest time on the axis is logarithmic
_SLOWEST = 3  # tokens that the description names


def token_chart(name: str, title: str, rounds: Mapping[str, Sequence[Sequence[float]]]) -> Chart:
    """Return token number against latency: the median over the rounds, from the fastest round to the slowest.

    Parameters
    ----------
    rounds : of each contender, (rounds, tokens) milliseconds through all layers: at least one round of two tokens.
    """
    tokens = min(len(row) for rows in rounds.values() for row in rows)
    times = {label: np.array([row[:tokens] for row in rows], float) for label, rows in rounds.items()}
    scale, unit = (1e3, "µs") if max(values.max() for values in times.values()) < 1 else (1.0, "ms")
    medians = {label: scale * np.median(values, axis=0) for label, values in times.items()}

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        ends = [scale * end for values in times.values() for end in (values.min(), values.max())]
        if 0 < min(ends) < max(ends) / _WIDE:
            log_axis(axes.yaxis, *span(ends, 1.1))
        else:
            plain_axis(axes.yaxis)
            axes.set_ylim(0, 1.06 * max(ends))
        handles = []
        for label, values in times.items():
            color = hue(0) if label.startswith("elastic") else INK
            numbers = np.arange(1, tokens + 1)
            low, high = scale * values.min(axis=0), scale * values.max(axis=0)
            axes.fill_between(numbers, low, high, color=color, alpha=0.18, linewidth=0)
            handles += axes.plot(numbers, medians[label], color=color, linewidth=1.2, label=shown(label))
        axes.set_xlabel("token of the cycle")
        axes.set_ylabel(f"{unit} through all layers")
        legend(figure, handles)

    return Chart(
        name,
        title,
        f"{title}: {'; '.join(_described(label, values, unit) for label, values in medians.items())}. Lines are medians over "
        "the rounds, bands reach from the fastest round to the slowest.",
        draw,
        height=280 + legend_height(list(times)),
    )


def _described(label: str, medians: Any, unit: str) -> str:
    """Return the typical latency of a contender, and its slowest tokens by number."""
    slowest = np.argsort(-medians, kind="stable")[:_SLOWEST]
    named = ", ".join(f"{token + 1} ({medians[token]:.3g} {unit})" for token in sorted(slowest))
    return f"{label} takes {np.median(medians):.3g} {unit} for a token in the middle, and most for tokens {named}"
