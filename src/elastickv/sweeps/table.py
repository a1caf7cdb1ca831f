"""A sweep as a value: rows, files, a table in a notebook."""

import html
import io
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from elastickv.errors import UsageError
from elastickv.reports import dumps
from elastickv.reports.files import write_bytes, write_text
from elastickv.reports.rows import COLUMNS, csv_of, markdown_of, row
from elastickv.sweeps.journal import read

EXPORTS = (".csv", ".md", ".json", ".parquet")
_BRIEF = (
    "status",
    "recipe_used",
    "ratio_read",
    "baseline_ms",
    "elastic_ms",
    "speedup",
    "speedup_low",
    "speedup_high",
    "recipe_error",
)


@dataclass(frozen=True)
class Sweep:
    """The cells of a sweep that are measured so far; shown as a table in a notebook.

    Attributes
    ----------
    header : plan, versions, and how many cells there are to be.
    cells : one a cell: `cell` (axis -> value), `status`, `reason`, and where the status is ok all of the result.
    """

    header: dict[str, Any]
    cells: list[dict[str, Any]]

    @classmethod
    def load(cls, path: Path | str) -> "Sweep":
        """Return the sweep that a file holds, its cells in the order of their axes.

        Raises
        ------
        UsageError : if it is no file of a sweep.
        """
        header, cells = read(Path(path))
        axes = list(header.get("axes", {}))

        def place(record: dict[str, Any]) -> tuple[tuple[str, float, str], ...]:
            found = [record["cell"].get(axis) for axis in axes]
            return tuple(("", v, "") if isinstance(v, (int, float)) else ("t", 0.0, str(v)) for v in found)

        return cls(header, sorted(cells, key=place))

    @property
    def complete(self) -> bool:
        """Whether every cell of the plan is there."""
        return bool(len(self.cells) == self.header["cells"])

    def rows(self) -> list[dict[str, Any]]:
        """Return a row a cell: its axes, status and reason, then the columns of a result; None where nothing was measured."""
        axes = list(self.header.get("axes", {}))
        return [self._row(record, axes) for record in self.cells]

    def to_json(self) -> str:
        """Return header and cells, raw samples among them, as JSON."""
        return dumps({"sweep": self.header, "cells": self.cells})

    def to_csv(self) -> str:
        """Return the rows as CSV."""
        return csv_of(self._some_rows())

    def to_markdown(self) -> str:
        """Return the rows' most asked-for columns as a Markdown table."""
        return markdown_of(self._brief())

    def to_pandas(self) -> Any:
        """Return the rows as a `pandas.DataFrame`.

        Raises
        ------
        UsageError : if pandas is not installed.
        """
        _require("pandas")
        import pandas

        return pandas.DataFrame(self.rows())

    def to_parquet(self) -> bytes:
        """Return the rows as a Parquet file.

        Raises
        ------
        UsageError : if pyarrow is not installed.
        """
        _require("pyarrow")
        import pyarrow
        import pyarrow.parquet

        out = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(self._some_rows()), out)
        return out.getvalue()

    def export(self, path: Path) -> None:
        """Write the sweep in the format that the suffix names: one of `EXPORTS`.

        Raises
        ------
        UsageError : as `check_export`, and if it cannot be written.
        """
        check_export(path)
        if path.suffix.lower() == ".parquet":
            write_bytes(path, self.to_parquet())
            return
        texts = {".csv": self.to_csv, ".md": self.to_markdown, ".json": self.to_json}
        write_text(path, texts[path.suffix.lower()]())

    def _repr_html_(self) -> str:
        if not self.cells:
            return "<p>No cell is measured yet.</p>"
        rows = self._brief()

        def line(tag: str, values: list[Any]) -> str:
            shown = (f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value) for value in values)
            return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in shown) + "</tr>"

        body = "".join(line("td", list(cells.values())) for cells in rows)
        note = "" if self.complete else f"<p>{len(self.cells)} of {self.header['cells']} cells.</p>"
        return f"<table><thead>{line('th', list(rows[0]))}</thead><tbody>{body}</tbody></table>{note}"

    def _row(self, record: dict[str, Any], axes: list[str]) -> dict[str, Any]:
        figures = row(record) if record["status"] == "ok" else dict.fromkeys((name for name, _ in COLUMNS), None)
        figures = {"recipe_used": figures.pop("recipe")} | {name: v for name, v in figures.items() if name not in axes}
        return {axis: record["cell"].get(axis) for axis in axes} | {k: record.get(k) for k in ("status", "reason")} | figures

    def _some_rows(self) -> list[dict[str, Any]]:
        rows = self.rows()
        if not rows:
            raise UsageError("the sweep holds no cell yet: resume it first")
        return rows

    def _brief(self) -> list[dict[str, Any]]:
        axes = list(self.header.get("axes", {}))
        reasons = any(record.get("reason") for record in self.cells)
        kept = [*axes, *_BRIEF, *(["reason"] if reasons else [])]
        return [{name: cells[name] for name in kept} for cells in self._some_rows()]


def check_export(path: Path) -> None:
    """Refuse a file that `Sweep.export` could not write, before anything is measured.

    Raises
    ------
    UsageError : if the suffix names no format, or one that needs what is not installed.
    """
    if path.suffix.lower() not in EXPORTS:
        raise UsageError(f"--export {path}: the suffix names no format; choose {', '.join(EXPORTS)}")
    if path.suffix.lower() == ".parquet":
        _require("pyarrow")


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise UsageError(f"{package} is not installed: pip install {package}, or take another format")
