"""A comparison as a table: for a terminal, a page, a spreadsheet."""

import io
import json
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from elastickv.results.compare.change import Row
from elastickv.results.compare.runs import Cell
from elastickv.results.formats.html import html_table
from elastickv.results.formats.plain_json import dumps
from elastickv.results.formats.rows import csv_of, markdown_cell
from elastickv.results.formats.table import literal
from elastickv.results.formats.units import size

_COLORS = {"SAME": "dim", "FASTER": "green", "SLOWER": "bold red", "AMBIGUOUS": "yellow"}
_HEADERS = ("figure", "A ms", "B ms", "B / A", "verdict", "dense B / A", "error A", "error B", "fidelity")
_MODEL_HEADERS = ("tokens/s A", "tokens/s B", "KV read A", "KV read B", "KV stored A", "KV stored B")
_NUMBERS = ("A ms", "B ms", "B / A", "dense B / A", "error A", "error B", *_MODEL_HEADERS)


class ComparedResults(Protocol):
    """A comparison, as far as its texts need it."""

    @property
    def a(self) -> str:
        """What B is compared with."""

    @property
    def b(self) -> str:
        """What is compared with A."""

    @property
    def margin_percent(self) -> float:
        """Changes of times within it are none."""

    @property
    def fidelity_margin_percent(self) -> float:
        """Changes of recipe errors within it are none."""

    @property
    def rows(self) -> list[Row]:
        """Every figure of every cell."""

    @property
    def only_a(self) -> dict[str, str]:
        """Cells that A alone measured."""

    @property
    def only_b(self) -> dict[str, str]:
        """Cells that B alone measured."""

    @property
    def warnings(self) -> list[str]:
        """What limits the comparison."""

    def counts(self) -> dict[str, int]:
        """Return how many rows each verdict has."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""


def flat(row: Row) -> dict[str, Any]:
    """Return a row as columns with plain values; None where there is none."""
    ratio, fidelity = row.ratio, row.fidelity
    return {
        "cell": str(row.cell),
        **dict(row.cell.pairs),
        "figure": row.figure,
        "a_ms": row.a_ms,
        "b_ms": row.b_ms,
        "ratio": ratio and ratio.estimate,
        "ratio_low": ratio and ratio.low,
        "ratio_high": ratio and ratio.high,
        "verdict": row.verdict,
        "control": row.control,
        "dense_ratio": row.drift,
        "recipe_a": row.recipe_a,
        "recipe_b": row.recipe_b,
        "ratio_read_a": row.ratio_read_a,
        "ratio_read_b": row.ratio_read_b,
        "recipe_error_a": fidelity.a and fidelity.a.mean,
        "recipe_error_b": fidelity.b and fidelity.b.mean,
        "fidelity": fidelity.verdict,
        "tokens_per_s_a": row.tokens_per_s_a,
        "tokens_per_s_b": row.tokens_per_s_b,
        **{f"kv_{name}_bytes_a": row.kv_bytes_a.get(name) for name in ("read", "stored")},
        **{f"kv_{name}_bytes_b": row.kv_bytes_b.get(name) for name in ("read", "stored")},
    }


def as_terminal(comparison: ComparedResults) -> str:
    """Return each verdict with its interval and recipe errors, their counts, and every warning."""
    out = io.StringIO()
    console = Console(file=out, width=200, highlight=False, force_jupyter=False, force_terminal=False)
    table = Table(box=None, pad_edge=False)
    headers, rows = _grid(comparison)
    for header in headers:
        table.add_column(literal(header), justify="right" if header in _NUMBERS else "left", no_wrap=header in _NUMBERS)
    for cells in rows:
        table.add_row(*(f"[{_COLORS[text]}]{text}[/]" if text in _COLORS else literal(text) for text in cells))
    console.print(table)
    for line in _sentences(comparison):
        console.print(literal(line), soft_wrap=True)
    for warning in comparison.warnings:
        console.print(f"[yellow]warning:[/] {literal(warning)}", soft_wrap=True)
    return out.getvalue()


def as_html(comparison: ComparedResults) -> str:
    """Return a table for a notebook, with its sentences and warnings."""
    headers, rows = _grid(comparison)
    return html_table(headers, rows, [*_sentences(comparison), *(f"warning: {warning}" for warning in comparison.warnings)])


def as_markdown(comparison: ComparedResults) -> str:
    """Return the same as Markdown."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(map(markdown_cell, cells)) + " |"

    headers, rows = _grid(comparison)
    lines = [line(headers), "|" + " --- |" * len(headers), *map(line, rows), ""]
    lines += [f"- {markdown_cell(text)}" for text in _sentences(comparison)]
    lines += [f"- warning: {markdown_cell(warning)}" for warning in comparison.warnings]
    return "\n".join(lines) + "\n"


def as_csv(comparison: ComparedResults) -> str:
    """Return a header line and a line for each figure of a cell."""
    rows = [flat(row) for row in comparison.rows]
    columns = dict.fromkeys(name for row in rows for name in row)
    return csv_of([{name: row.get(name) for name in columns} for row in rows])


def as_jsonl(comparison: ComparedResults) -> str:
    """Return a line of JSON for each figure of a cell."""
    return "".join(json.dumps(row.as_dict(), allow_nan=False) + "\n" for row in comparison.rows)


FORMATS: dict[str, Callable[[ComparedResults], str]] = {
    "table": as_terminal,
    "json": lambda comparison: dumps(comparison.as_dict()),
    "jsonl": as_jsonl,
    "csv": as_csv,
    "md": as_markdown,
    "html": as_html,
}


def _grid(comparison: ComparedResults) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows: a column for each option in which cells differ, then the figures."""
    pairs = [dict(row.cell.pairs) for row in comparison.rows]
    common = dict(_common(comparison).pairs)
    axes = [name for name in dict.fromkeys(name for values in pairs for name in values) if name not in common]
    models = [_model_figures(row) for row in comparison.rows]
    shown = [number for number in range(len(_MODEL_HEADERS)) if any(figures[number] for figures in models)]
    rows = [
        [*(_short(values.get(name)) for name in axes), *_figures(row), *(figures[number] or "-" for number in shown)]
        for values, row, figures in zip(pairs, comparison.rows, models, strict=True)
    ]
    return [*axes, *_HEADERS, *(_MODEL_HEADERS[number] for number in shown)], rows


def _common(comparison: ComparedResults) -> Cell:
    """Return what all cells share."""
    first, *others = (row.cell for row in comparison.rows)
    return Cell(tuple(pair for pair in first.pairs if all(pair in cell.pairs for cell in others)), ())


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _figures(row: Row) -> tuple[str, ...]:
    ratio, fidelity = row.ratio, row.fidelity
    return (
        row.figure,
        f"{row.a_ms:.4g}",
        f"{row.b_ms:.4g}",
        f"{ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" if ratio else f"{row.b_ms / row.a_ms:.3f} [no interval]",
        row.verdict,
        f"{row.drift:.3f}" if row.drift else "-",
        f"{fidelity.a.mean:.4f}" if fidelity.a else "-",
        f"{fidelity.b.mean:.4f}" if fidelity.b else "-",
        fidelity.verdict,
    )


def _model_figures(row: Row) -> tuple[str, ...]:
    """Return tokens per second and bytes of a model's decode on both sides; empty texts where there are none."""
    rates = ("" if rate is None else f"{rate:.4g}" for rate in (row.tokens_per_s_a, row.tokens_per_s_b))
    sizes = (size(side.get(name)) for name in ("read", "stored") for side in (row.kv_bytes_a, row.kv_bytes_b))
    return (*rates, *sizes)


def _sentences(comparison: ComparedResults) -> list[str]:
    counts = ", ".join(f"{count} {verdict}" for verdict, count in comparison.counts().items() if count)
    margins = f"margin {comparison.margin_percent:g} %, of recipe errors {comparison.fidelity_margin_percent:g} %"
    lines = [f"{comparison.b} against {comparison.a}: {counts} ({margins}; 95 % intervals)"]
    common = _common(comparison)
    if common.pairs:
        lines.insert(0, f"all cells: {common}")
    changed = {(row.recipe_a, row.recipe_b) for row in comparison.rows if row.recipe_a != row.recipe_b}
    lines += [f"recipe: {before or 'none'} in A, {after or 'none'} in B" for before, after in sorted(changed, key=str)]
    for why in dict.fromkeys(row.why for row in comparison.rows if row.why):
        lines.append(
            f"no interval of {', '.join(dict.fromkeys(row.figure for row in comparison.rows if row.why == why))}: {why}"
        )
    reasons = dict.fromkeys(row.fidelity.why for row in comparison.rows if row.fidelity.why)
    lines += [f"fidelity unknown: {why}" for why in reasons]
    for name, alone in (("A", comparison.only_a), ("B", comparison.only_b)):
        lines += [f"only {name} measured {cell}: {why}" for cell, why in alone.items()]
    return lines
