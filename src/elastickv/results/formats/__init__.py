"""How a result is shown: one file a format, one line in `FORMATS`."""

from collections.abc import Callable

from elastickv.benchmark.result import Result
from elastickv.results.files import write_text
from elastickv.results.formats.plain_json import dumps
from elastickv.results.formats.rows import as_csv, as_json, as_jsonl, as_markdown
from elastickv.results.formats.table import as_html, as_table

FORMATS: dict[str, Callable[[Result], str]] = {
    "table": as_table,
    "json": as_json,
    "jsonl": as_jsonl,
    "csv": as_csv,
    "md": as_markdown,
    "html": as_html,
}
__all__ = ["FORMATS", "dumps", "write_text"]
