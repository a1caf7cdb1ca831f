"""A comparison as a table: for a terminal, a page, a spreadsheet."""

import csv
import io
import json
from collections.abc import Callable, Iterable
from html import escape as html_escape
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from elastickv.report.change import Row
from elastickv.report.comparison import Comparison
from elastickv.report.plain_json import dumps
from elastickv.report.rows import exact
from elastickv.report.runs import Cell

_COLOURS = {"SAME": "dim", "FASTER": "green", "SLOWER": "bold red", "AMBIGUOUS": "yellow"}
_HEADERS = ("cell", "figure", "A ms", "B ms", "B / A", "verdict", "dense B / A", "recipe error A", "B", "fidelity")


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
    }


def as_terminal(comparison: Comparison) -> str:
    """Return what a person wants to see first: each verdict with its interval and its price, the sum of them, every warning."""
    out = io.StringIO()
    console = Console(file=out, width=160, highlight=False)
    table = Table(box=None, pad_edge=False)
    for header in _HEADERS:
        table.add_column(header, justify="left" if header in ("cell", "figure", "verdict", "fidelity") else "right")
    common = _common(comparison)
    for row in comparison.rows:
        colour = _COLOURS[row.verdict]
        shown = [escape(text) for text in _cells(row, common)]
        shown[_HEADERS.index("verdict")] = f"[{colour}]{row.verdict}[/]"
        table.add_row(*shown)
    console.print(table)
    for line in _sentences(comparison):
        console.print(escape(line), soft_wrap=True)
    for warning in comparison.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    return out.getvalue()


def as_html(comparison: Comparison) -> str:
    """Return a table for a notebook, with everything that is said of it."""

    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html_escape(text)}</{tag}>" for text in cells) + "</tr>"

    common = _common(comparison)
    rows = "".join(line(_cells(row, common), "td") for row in comparison.rows)
    said = [*_sentences(comparison), *(f"warning: {warning}" for warning in comparison.warnings)]
    paragraphs = "".join(f"<p>{html_escape(text)}</p>" for text in said)
    return f"<table><thead>{line(_HEADERS, 'th')}</thead><tbody>{rows}</tbody></table>{paragraphs}"


def as_markdown(comparison: Comparison) -> str:
    """Return the same as Markdown."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"

    common = _common(comparison)
    lines = [line(_HEADERS), "|" + " --- |" * len(_HEADERS), *(line(_cells(row, common)) for row in comparison.rows), ""]
    lines += [f"- {text}" for text in _sentences(comparison)]
    lines += [f"- warning: {warning}" for warning in comparison.warnings]
    return "\n".join(lines) + "\n"


def as_csv(comparison: Comparison) -> str:
    """Return a header line and a line for each figure of a cell."""
    rows = [flat(row) for row in comparison.rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: exact(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def as_jsonl(comparison: Comparison) -> str:
    """Return a line of JSON for each figure of a cell."""
    return "".join(json.dumps(row.as_dict(), allow_nan=False) + "\n" for row in comparison.rows)


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "table": as_terminal,
    "json": lambda comparison: dumps(comparison.as_dict()),
    "jsonl": as_jsonl,
    "csv": as_csv,
    "md": as_markdown,
    "html": as_html,
}


def _common(comparison: Comparison) -> Cell:
    """Return what all cells share, which is said once; nothing where there is one cell."""
    cells = {row.cell for row in comparison.rows}
    if len(cells) == 1:
        return Cell((), ())
    return Cell(tuple(pair for pair in comparison.rows[0].cell.pairs if all(pair in cell.pairs for cell in cells)), ())


def _cells(row: Row, common: Cell) -> tuple[str, ...]:
    ratio, fidelity = row.ratio, row.fidelity
    return (
        str(Cell(tuple(pair for pair in row.cell.pairs if pair not in common.pairs), ())),
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


def _sentences(comparison: Comparison) -> list[str]:
    counts = ", ".join(f"{count} {verdict}" for verdict, count in comparison.counts().items() if count)
    margins = f"margin {comparison.margin_percent:g} %, of recipe errors {comparison.fidelity_margin_percent:g} %"
    lines = [f"{comparison.b} against {comparison.a}: {counts} ({margins}; 95 % intervals)"]
    common = _common(comparison)
    if common.pairs:
        lines.append(f"all cells: {common}")
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
