"""How charts look: colors that a page can replace, text that stays text, axes with plain numbers."""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from math import ceil, floor, log2, log10
from typing import Any
from unicodedata import east_asian_width

from elastickv.html_report.report_data import IntervalEstimate

# The Okabe-Ito hues, dark enough for a white page; the page's style sheet replaces them in dark mode.
INK, MUTED, GRID, PAPER = "#1b1f24", "#57606a", "#d9dee4", "#ffffff"
HUES = ("#0072b2", "#d55e00", "#008a65", "#b0568f", "#9a6a00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 390  # of a chart, in pixels of the page: a phone's
LINES = ("-", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)))
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    hue: f"--hue-{number}" for number, hue in enumerate(HUES, 1)
}
_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "elastickv",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.labelcolor": INK,
    "axes.labelsize": 10.5,
    "axes.titlesize": 10.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 2.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 9.5,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 9.5,
}
_FONT = re.compile(r"(font: [^;\"]*?\d(?:\.\d+)?px) [^;\"]*")
_TAG = re.compile(r"<[^>]*>")
_ROOT = re.compile(r"<svg[^>]*>")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
# What XML has no form for, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes
    ----------
    name : a file's name without its suffix.
    title : what it shows.
    alt : what a reader sees in it, as a sentence.
    draw : draws it into a Matplotlib figure.
    width, height : in pixels of the page.
    """

    name: str
    title: str
    alt: str
    draw: Callable[[Any], None]
    width: float = WIDTH
    height: float = 330

    def svg(self) -> str:
        """Return it as standalone SVG: dark on white."""
        with drawing():
            out = io.StringIO()
            self._figure().savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        return _clean(out.getvalue(), self)

    def png(self) -> bytes:
        """Return it as a picture of twice as many pixels."""
        with drawing():
            out = io.BytesIO()
            self._figure().savefig(out, format="png", dpi=144, metadata={"Software": None})
        return out.getvalue()

    def _figure(self) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(self.width / 72, self.height / 72), layout="constrained")
        self.draw(figure)
        return figure


class drawing:  # noqa: N801
    """In it Matplotlib draws as every chart here is drawn, and says nothing of glyphs that its own font lacks."""

    def __enter__(self) -> None:
        import matplotlib

        self._quiet = warnings.catch_warnings()
        self._quiet.__enter__()
        warnings.filterwarnings("ignore", message="Glyph")
        self._style = matplotlib.rc_context(_RC)
        self._style.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._style.__exit__(*error)
        self._quiet.__exit__(*error)


def themed(svg: str) -> str:
    """Return SVG that uses the colors of the page around it."""

    def recolored(tag: re.Match[str]) -> str:
        text = tag[0]
        if text.startswith("<svg "):
            return text  # it holds the description, which may name a color
        for color, variable in VARIABLES.items():
            text = text.replace(color, f"var({variable})")
        return text

    return _TAG.sub(recolored, svg)


def shown(text: str, longest: int = 64) -> str:
    """Return a text of a file for a chart: without control characters, and as wide as `longest` letters at most."""
    clean = _CONTROL.sub("\ufffd", text[: 2 * longest])
    ends = list(accumulate(2 if east_asian_width(char) in "WF" else 1 for char in clean))
    if len(text) > len(clean) or (ends and ends[-1] > longest):
        clean = clean[: sum(end < longest for end in ends)] + "…"
    # Matplotlib leaves legend entries out that begin so.
    return "\u200b" + clean if clean.startswith("_") else clean


def hue(number: int) -> str:
    """Return a series' color; series that share one differ in marker and line."""
    return HUES[number % len(HUES)]


def marker(number: int) -> str:
    """Return a series' marker."""
    return MARKERS[number % len(MARKERS)]


def line(number: int) -> Any:
    """Return a series' line style."""
    return LINES[number // len(HUES) % len(LINES)]


def legend(figure: Any, handles: Sequence[Any]) -> None:
    """Add a legend below the axes, where it covers nothing."""
    labels = [handle.get_label() for handle in handles]
    columns = _columns(labels)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.4, handletextpad=0.6)


def legend_height(labels: Sequence[str]) -> float:
    """Return the pixels that a legend of these labels takes."""
    return 14.5 * -(-len(labels) // _columns(labels)) + 8


def _columns(labels: Sequence[str]) -> int:
    longest = max((len(shown(label)) for label in labels), default=0)
    return 3 if longest <= 11 else 2 if longest <= 24 else 1


def plain_axis(axis: Any) -> None:
    """Show plain numbers at a linear axis: 2500, 0.01."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def log_axis(axis: Any, low: float, high: float, base: int = 10) -> None:
    """Make an axis logarithmic, from `low` to `high`, with plain numbers at round values."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    name = axis.axis_name
    set_scale, set_limits = (getattr(axis.axes, f"set_{name}{what}") for what in ("scale", "lim"))
    set_scale("log", base=base)
    set_limits(low, high)
    axis.set_major_locator(FixedLocator(_ticks(low, high, base)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def bounds(estimate: IntervalEstimate) -> tuple[float, float]:
    """Return an estimate's interval; the estimate twice where there is none."""
    if estimate.low is None or estimate.high is None:
        return estimate.estimate, estimate.estimate
    return estimate.low, estimate.high


def bars(estimates: Sequence[IntervalEstimate], scale: float = 1.0) -> list[list[float]]:
    """Return the lengths of error bars, below and above."""
    return [[scale * abs(one.estimate - bounds(one)[end]) for one in estimates] for end in (0, 1)]


def rows_axes(figure: Any, labels: Sequence[str]) -> Any:
    """Return axes with a row for each label, written above the row so that long names leave room for the data."""
    axes = figure.add_subplot()
    axes.set_ylim(len(labels) - 0.45, -0.75)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    for row, label in enumerate(labels):
        axes.text(0, row - 0.28, shown(label), transform=axes.get_yaxis_transform(), fontsize=9.5, va="bottom", color=INK)
    return axes


def number(value: float) -> str:
    """Return a short plain number: 0.002, 25, 4096, 131072, 1e+07."""
    if value == 0:
        return "0"
    text = f"{value:.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:g}"
    return "\u2212" + text[1:] if value < 0 else text


def span(values: Sequence[float], room: float = 1.25) -> tuple[float, float]:
    """Return the limits of a logarithmic axis that holds the positive `values` with some room."""
    least, most = min(values), max(values)
    if most / least < 1.6:
        room = max(room, (1.6 * least / most) ** 0.5 * 1.1)
    return least / room, most * room


def _ticks(low: float, high: float, base: int) -> list[float]:
    """Return three to seven round values: powers of two, or of ten and multiples of them; more closely where they are few."""
    if base == 2:
        exponents = range(ceil(log2(low)), floor(log2(high)) + 1)
        ticks = [2.0**exponent for exponent in exponents[:: -(-len(exponents) // 7) or 1]]
        if len(ticks) > 2:
            return ticks
    exponents = range(floor(log10(low)), ceil(log10(high)) + 1)
    for multiples in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)):
        ticks = [m * 10.0**exponent for exponent in exponents for m in multiples if low <= m * 10.0**exponent <= high]
        if len(ticks) > 2:
            return ticks[:: -(-len(ticks) // 7)]
    step = 10.0 ** floor(log10(high - low))
    while (high - low) / step < 3:
        step /= 2
    return [step * count for count in range(ceil(low / step), floor(high / step) + 1)]


def _clean(svg: str, chart: Chart) -> str:
    """Return what Matplotlib wrote without what a page must not hold, its ids unique and its font the reader's own.

    Replacements are functions or lie outside of patterns: a chart's texts come from files and may hold anything.
    """
    body = _NOT_XML.sub("\ufffd", svg[svg.index("<svg") :])
    body = re.sub(r"<metadata>.*?</metadata>", "", body, count=1, flags=re.DOTALL)
    root = _ROOT.match(body)
    assert root is not None

    def own(tag: re.Match[str]) -> str:
        text = tag[0].replace(' id="', f' id="{chart.name}-')
        text = text.replace('href="#', f'href="#{chart.name}-').replace("url(#", f"url(#{chart.name}-")
        return _FONT.sub(r"\1 system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif", text)

    return f"<svg {_opening(chart)}>{_TAG.sub(own, body[root.end() :]).strip()}\n"


def _opening(chart: Chart) -> str:
    return (
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" version="1.1" '
        f'viewBox="0 0 {chart.width:g} {chart.height:g}" role="img" aria-label="{escape(_CONTROL.sub(" ", chart.alt))}"'
    )
