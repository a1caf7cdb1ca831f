"""A fidelity result as a figure: loss over C and over stored bits, and a heat map of retrieval. Needs matplotlib."""

import io
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import Any

from elastickv.errors import UsageError, one_line
from elastickv.results.files import write_bytes
from elastickv.results.kinds.evaluation_result import EvaluationResult, LossRow, PassKeyRow

SUFFIXES = (".png", ".svg", ".pdf")
_MOST_TICKS = 5
_FIGURES = (("ppl_change_percent", "perplexity change, %"), ("kl", "KL, nats"), ("top1_percent", "same top-1, %"))


def check_plot(path: Path) -> None:
    """Refuse a figure that cannot be drawn.

    Raises
    ------
    UsageError : if the suffix is unknown or matplotlib is missing.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"`plot` {path}: the suffix says the format; give {', '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise UsageError('`plot` needs matplotlib: pip install "elastickv[report]"')


def draw(result: EvaluationResult, path: Path) -> None:
    """Draw a result into a file.

    Raises
    ------
    UsageError : as `check_plot`, and if it cannot be written.
    """
    check_plot(path)
    from matplotlib import rc_context

    drawn = io.BytesIO()
    # The names are text: what stands between dollar signs is no formula.
    with rc_context({"text.parse_math": False}):
        _figure(result).savefig(drawn, format=path.suffix.lower()[1:])
    write_bytes(path, drawn.getvalue())


def _figure(result: EvaluationResult) -> Any:
    from matplotlib.figure import Figure

    needle = result.needle
    names = list(dict.fromkeys(name for row in needle for name in row.found))
    rows = 2 if needle else 1
    figures = _FIGURES if any(row.compress for row in result.rows) or not result.rows else ()
    formats = any(row.stored_format for row in result.rows)
    columns = max(len(figures) + formats, len(names))
    figure = Figure(figsize=(3.4 * columns, 3.2 * rows), layout="constrained")
    if formats:
        _formats(figure.add_subplot(rows, columns, len(figures) + 1), result.rows)
    for number, (name, label) in enumerate(figures):
        axes = figure.add_subplot(rows, columns, number + 1)
        for context in dict.fromkeys(row.context for row in result.rows):
            _curve(axes, [row for row in result.rows if row.context == context and row.compress], name, context)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("dense bytes / bytes read")
        axes.set_ylabel(label)
        if result.rows:
            axes.legend(title="context")
    for number, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, columns + number + 1)
        _map(axes, needle, name)
    figure.suptitle("\n".join(wrap(one_line(f"{result.model_name}: {', '.join(result.texts)}"), 32 * columns)))
    return figure


def _curve(axes: Any, rows: list[LossRow], name: str, context: int) -> None:
    figures = [getattr(row, name) for row in rows]
    means = [figure.mean for figure in figures]
    below, above = [figure.mean - figure.low for figure in figures], [figure.high - figure.mean for figure in figures]
    bars = [[max(0.0, length) for length in lengths] for lengths in (below, above)]
    axes.errorbar([row.read_ratio for row in rows], means, yerr=bars, marker="o", capsize=3, label=str(context))


def _formats(axes: Any, rows: list[LossRow]) -> None:
    """Draw the KL divergence of KV formats against the bits that they store, a point a format."""
    for context in dict.fromkeys(row.context for row in rows):
        mine = [
            (row.stored_format.stored_bits_per_element, row) for row in rows if row.stored_format and row.context == context
        ]
        axes.plot([bits for bits, _ in mine], [row.kl.mean for _, row in mine], "o", label=str(context))
        for bits, row in mine:
            axes.annotate(one_line(row.cache), (bits, row.kl.mean), fontsize=5, xytext=(3, 2), textcoords="offset points")
    axes.set_yscale("log")
    axes.set_xlabel("stored bits an element")
    axes.set_ylabel("KL, nats")
    axes.legend(title="context")


def _map(axes: Any, rows: list[PassKeyRow], name: str) -> None:
    grid = [[float(hit) for hit in row.found.get(name, [float("nan")] * len(row.depths))] for row in rows]
    axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_yticks(range(len(rows)), [str(row.tokens) for row in rows])
    depths = rows[0].depths
    shown = range(0, len(depths), -(-len(depths) // _MOST_TICKS))
    axes.set_xticks(shown, [f"{depths[i]:.0%}" for i in shown])
    axes.set_xlabel("depth of the pass key")
    axes.set_title(one_line(name))
