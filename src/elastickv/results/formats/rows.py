"""A result as one row of metrics (CSV, Markdown), or whole as JSON."""

import csv
import io
import json
import re
from typing import Any

from elastickv.benchmark.from_dict import to_dict
from elastickv.benchmark.result import Result
from elastickv.errors import UsageError, one_line, printable
from elastickv.results.formats.plain_json import dumps, plain
from elastickv.results.result_metrics import METRICS

# What Markdown takes for HTML, code, emphasis, a formula, the end of a cell or a link; `_` inside of a word is none of these.
_MARKUP = re.compile(r"[\\<|`*&~$]|(?<=\])\(|(?<![^\W_])_|_(?![^\W_])")
_COMPUTED = ("=", "+", "-", "@")


def row(result: Result) -> dict[str, Any]:
    """Return the metrics of a result, the columns of every table of results; None where one was not measured."""
    return {name: metric.value(result) for name, metric in METRICS.items()}


def as_jsonl(result: Any) -> str:
    """Return the whole result on one line of JSON."""
    return json.dumps(to_dict(result), allow_nan=False) + "\n"


def as_json(result: Any) -> str:
    """Return the whole result as indented JSON."""
    return dumps(to_dict(result))


def as_csv(result: Result) -> str:
    """Return a header line and one row."""
    return csv_of([row(result)])


def csv_of(rows: list[dict[str, Any]]) -> str:
    """Return a header line and `rows`, which have the same columns; nothing without rows."""
    if not rows:
        return ""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(csv_text, rows[0]))
    writer.writerows([_exact(value) for value in cells.values()] for cells in rows)
    return out.getvalue()


def as_markdown(result: Result) -> str:
    """Return a table of two columns."""
    lines = ["| | |", "| --- | --- |"]
    lines += [f"| {name} | {_short(value)} |" for name, value in row(result).items()]
    return "\n".join(lines) + "\n"


def markdown_of(rows: list[dict[str, Any]]) -> str:
    """Return a table with a line a row; `rows` have the same columns. Nothing without rows."""
    if not rows:
        return ""
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
    """Return a text as Markdown shows it, in a table too: one line, no column, HTML, code, emphasis or link of its own."""
    return _MARKUP.sub(r"\\\g<0>", one_line(text))
