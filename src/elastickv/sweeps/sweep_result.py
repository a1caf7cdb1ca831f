"""The result of a sweep: rows, files, a table in a notebook."""

import io
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from elastickv.benchmark.result import Result
from elastickv.errors import UsageError
from elastickv.inputs import file_path
from elastickv.results.documents import Document
from elastickv.results.files import write_bytes
from elastickv.results.formats import dumps, write_text
from elastickv.results.formats.html import html_paragraphs, html_table
from elastickv.results.formats.rows import brief, csv_of, frame, markdown_cell, markdown_of, row
from elastickv.results.kinds.gguf_result import GgufBaseline
from elastickv.results.kinds.model_result import ModelBenchResult
from elastickv.results.kinds.sweep_record import MISSING, MissingCells, SweepHeader, sweep_record
from elastickv.results.load import result_of, run_of
from elastickv.results.result_metrics import METRICS, listed_metrics
from elastickv.results.speed_ratios import gguf_ratios, model_ratios
from elastickv.sweeps.journal import read
from elastickv.sweeps.plan import name

EXPORTS = (".csv", ".md", ".json", ".parquet")
_BRIEF = (
    "status",
    "recipe_used",
    "fallback",
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
    header : plan, versions, and the number of planned cells.
    cells : for each cell `cell` (axis -> value), `status`, `reason` and, where the status is ok, the whole result.
    """

    header: dict[str, Any]
    cells: list[dict[str, Any]]

    @classmethod
    def load(cls, path: Path | str) -> "Sweep":
        """Return the sweep that a file holds, its cells in the order of their axes.

        Raises
        ------
        UsageError : if it is not the file of a sweep.
        """
        header, cells = read(file_path(path))
        axes = list(header.get("axes", {}))

        def place(record: dict[str, Any]) -> tuple[tuple[str, float, str], ...]:
            values = [record["cell"].get(axis) for axis in axes]
            return tuple(("", v, "") if isinstance(v, (int, float)) else ("t", 0.0, str(v)) for v in values)

        return cls(header, sorted(cells, key=place))

    @property
    def complete(self) -> bool:
        """Whether every cell of the plan is measured."""
        return not self.missing.count

    @cached_property
    def missing(self) -> MissingCells:
        """The planned cells that are not measured: their count, and each as far as the file says which they are."""
        header = sweep_record({"sweep": self.header}, "the sweep")
        assert isinstance(header, SweepHeader)
        return header.missing(record["cell"] for record in self.cells)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row a planned cell: its axes, status and reason, then the columns of a result; None where it has none.

        Cells that are not measured come last, with the status 'missing'.
        """
        axes = list(self.header.get("axes", {}))
        return [self._row(record, axes) for record in (*self.cells, *self.missing.records())]

    def as_dict(self) -> dict[str, Any]:
        """Return header and cells, raw samples among them, as JSON values; `missing` lists cells that are not measured."""
        missing = {"missing": [record["cell"] for record in self.missing.records()]} if self.missing.count else {}
        return {"sweep": self.header, "cells": self.cells} | missing

    def to_json(self) -> str:
        """Return the same as indented JSON."""
        return dumps(self.as_dict())

    def to_csv(self) -> str:
        """Return the rows as CSV."""
        return csv_of(self._some_rows())

    def to_markdown(self) -> str:
        """Return the most important columns of the rows as a Markdown table, and the cells that are missing as a sentence."""
        return markdown_of(self._brief()) + "".join(f"\n{markdown_cell(note)}\n" for note in self._notes())

    def to_pandas(self) -> Any:
        """Return the rows as a `pandas.DataFrame`.

        Raises
        ------
        UsageError : if pandas is not installed.
        """
        return frame(self.rows())

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

    def save(self, path: Path | str) -> None:
        """Write the sweep in the format that the suffix names: one of `EXPORTS`.

        Raises
        ------
        UsageError : as `check_export`, and if it cannot be written.
        """
        path = file_path(path)
        check_export(path)
        if path.suffix.lower() == ".parquet":
            write_bytes(path, self.to_parquet())
            return
        texts = {".csv": self.to_csv, ".md": self.to_markdown, ".json": self.to_json}
        write_text(path, texts[path.suffix.lower()]())

    def _repr_html_(self) -> str:
        if not self.cells:
            return html_paragraphs(["No cell is measured yet.", *self._notes()])
        rows = self._brief()
        return html_table(list(rows[0]), [[brief(value) for value in cells.values()] for cells in rows], self._notes())

    def _row(self, record: dict[str, Any], axes: list[str]) -> dict[str, Any]:
        try:
            figures = _figures(record) if record["status"] == "ok" else dict.fromkeys(METRICS, None)
        except UsageError as error:
            raise UsageError(f"the cell {name(record['cell'])}: {error}") from None
        figures = {"recipe_used": figures.pop("recipe")} | {label: v for label, v in figures.items() if label not in axes}
        status = "fell back" if figures.get("fallback") else record.get("status")
        state = {"status": status, "reason": record.get("reason")}
        return {axis: record["cell"].get(axis) for axis in axes} | state | figures

    def _notes(self) -> list[str]:
        return [] if self.complete else [self.missing.sentence("the sweep")]

    def _some_rows(self) -> list[dict[str, Any]]:
        if not self.cells:
            raise UsageError("the sweep holds no cell yet: resume it first")
        return self.rows()

    def _brief(self) -> list[dict[str, Any]]:
        axes = list(self.header.get("axes", {}))
        reasons = any(record.get("reason") for record in self.cells)
        columns = [*axes, *_BRIEF, *(name for name, _ in listed_metrics()), *(["reason"] if reasons else [])]
        return [{name: cells[name] for name in columns} for cells in self._some_rows() if cells["status"] != MISSING]


def _figures(record: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of a cell that was measured; of a baseline those that it has: a token through all layers."""
    result = result_of(Document("the result", record))
    if isinstance(result, Result):
        return row(result)
    run = run_of(Document("the result", record))
    if run is None or not isinstance(result, (ModelBenchResult, GgufBaseline)):
        raise UsageError("the result is of no known kind: cut off, edited or of another version; measure again")
    token = next(times for figure, times in run.figures.items() if figure.startswith("token"))
    dense = token.dense.get(result.baseline) if result.baseline else None
    ratios = gguf_ratios(result) if isinstance(result, GgufBaseline) else model_ratios(result)
    ratio = ratios.get(result.baseline) if dense and result.baseline else None
    known = {
        "date_utc": result.environment.get("date_utc"),
        "device": run.device,
        "seq": result.context,
        "recipe_hash": run.recipe,
        "ratio_read": run.ratio_read,
        "baseline": result.baseline,
        "baseline_ms": fmean(dense) if dense else token.mean_ms,
        "elastic_ms": token.mean_ms if dense else None,
        "speedup": ratio and ratio.estimate,
        "speedup_low": ratio and ratio.low,
        "speedup_high": ratio and ratio.high,
        "complete": run.complete,
    }
    return {name: known.get(name) for name in METRICS}


def check_export(path: Path) -> None:
    """Refuse a file that `Sweep.save` could not write, before anything is measured.

    Raises
    ------
    UsageError : if the suffix names no format, or one that needs what is not installed.
    """
    if path.suffix.lower() not in EXPORTS:
        raise UsageError(f"`export` {path}: the suffix names no format; choose {', '.join(EXPORTS)}")
    if path.suffix.lower() == ".parquet":
        _require("pyarrow")


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise UsageError(f"{package} is not installed: pip install {package}, or take another format")
