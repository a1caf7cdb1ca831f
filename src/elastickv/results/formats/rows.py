"""A result as one row: CSV, JSON Lines, Markdown."""

import csv
import io
import json
import re
from typing import Any

from elastickv.errors import UsageError, one_line, printable
from elastickv.results.formats.plain_json import plain

# What Markdown takes for HTML, for the end of a cell or for a link.
_MARKUP = re.compile(r"[\\<|]|(?<=\])\(")
_COMPUTED = ("=", "+", "-", "@")

COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("date_utc", ("date_utc",)),
    ("device", ("gpu", "name")),
    ("seq", ("configuration", "seq_len")),
    ("batch", ("configuration", "batch")),
    ("heads", ("configuration", "heads")),
    ("kv_heads", ("configuration", "kv_heads")),
    ("head_dim", ("configuration", "head_dim")),
    ("compress", ("configuration", "compression")),
    ("recipe", ("recipe", "text")),
    ("recipe_hash", ("recipe", "hash")),
    ("ratio_read", ("recipe", "ratio_read")),
    ("ratio_stored", ("recipe", "ratio_stored")),
    ("baseline", ("baseline", "name")),
    ("baseline_ms", ("baseline", "time_ms")),
    ("elastic_ms", ("results", "attention_time_ms")),
    ("speedup", ("speedup", "estimate")),
    ("speedup_low", ("speedup", "low")),
    ("speedup_high", ("speedup", "high")),
    ("cv", ("results", "coefficient_of_variation")),
    ("bandwidth_gbs", ("results", "memory_bandwidth_gbs")),
    ("roofline_score", ("results", "roofline_score")),
    ("kernel_error", ("fidelity", "sample", "kernel_error", "mean")),
    ("recipe_error", ("fidelity", "sample", "recipe_error", "mean")),
    ("cycle_speedup", ("inference_cycle", "speedup_vs_baseline")),
    ("complete", ("complete",)),
)


def row(result: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a result; None where it was not measured.

    Raises
    ------
    UsageError : if it lacks one.
    """
    return {name: _at(result, path) for name, path in COLUMNS}


def as_jsonl(result: dict[str, Any]) -> str:
    """Return the whole result on one line."""
    return json.dumps(result, allow_nan=False) + "\n"


def as_csv(result: dict[str, Any]) -> str:
    """Return a header line and one row."""
    return csv_of([row(result)])


def csv_of(rows: list[dict[str, Any]]) -> str:
    """Return a header line and `rows`, which have the same columns."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(csv_text, rows[0]))
    writer.writerows([_exact(value) for value in cells.values()] for cells in rows)
    return out.getvalue()


def as_markdown(result: dict[str, Any]) -> str:
    """Return a table of two columns."""
    lines = ["| | |", "| --- | --- |"]
    lines += [f"| {name} | {_short(value)} |" for name, value in row(result).items()]
    return "\n".join(lines) + "\n"


def markdown_of(rows: list[dict[str, Any]]) -> str:
    """Return a table with a line a row; `rows` have the same columns."""
    lines = ["| " + " | ".join(map(markdown_cell, rows[0])) + " |", "|" + " --- |" * len(rows[0])]
    lines += ["| " + " | ".join(map(_short, cells.values())) + " |" for cells in rows]
    return "\n".join(lines) + "\n"


def frame(rows: list[dict[str, Any]]) -> Any:
    """Return rows as a `pandas.DataFrame`.

    Raises
    ------
    UsageError : if pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise UsageError("to_pandas needs pandas: pip install pandas") from None
    return pandas.DataFrame(rows)


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if value is None:
            return None
        if not isinstance(value, dict) or key not in value:
            raise UsageError(f"the result lacks {'.'.join(path)}: cut off, edited or of another version; measure again")
        value = value[key]
    if isinstance(value, (dict, list)):
        raise UsageError(f"the result has no figure in {'.'.join(path)}: edited or of another version; measure again")
    return value


def _exact(value: Any) -> str:
    if value is None:
        return ""
    return plain(value) if isinstance(value, float) else csv_text(value) if isinstance(value, str) else str(value)


def csv_text(text: str) -> str:
    """Return a text as CSV holds it; one that a spreadsheet would compute begins with an apostrophe, which makes it text."""
    seen = printable(text)
    return f"'{seen}" if seen.lstrip()[:1] in _COMPUTED else seen


def brief(value: Any) -> str:
    """Return a value as a table shows it: four digits of a float, nothing for None."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _short(value: Any) -> str:
    return markdown_cell(brief(value))


def markdown_cell(text: str) -> str:
    """Return a text as Markdown shows it, in a table too: one line, no column of its own, no HTML, no link."""
    return _MARKUP.sub(r"\\\g<0>", one_line(text))
