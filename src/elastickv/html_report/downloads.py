"""The results themselves, as files inside the page."""

import base64
import csv
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass

from elastickv.html_report.report_data import ReportData
from elastickv.results.formats.rows import csv_text


@dataclass(frozen=True)
class Download:
    """A file inside the page: its name, what it holds, and how large it is."""

    name: str
    what: str
    content: bytes

    @property
    def address(self) -> str:
        """The file as a `data:` address: nothing is fetched."""
        return "data:application/gzip;base64," + base64.b64encode(self.content).decode("ascii")


def downloads(data: ReportData) -> list[Download]:
    """Return the raw samples as CSV and the whole results as JSON Lines, both compressed: gunzip them."""
    samples = _samples(data)
    files = [Download("samples.csv.gz", "every raw sample, milliseconds", _packed(samples))] if samples else []
    lines = "".join(json.dumps(document.value, allow_nan=False) + "\n" for document in data.documents)
    if not data.documents:
        return files
    return [*files, Download("results.jsonl.gz", "the results whole; after gunzip elastickv reads them again", _packed(lines))]


def _packed(text: str) -> bytes:
    # Without a time: the same results make the same page.
    return gzip.compress(text.encode("utf-8", "backslashreplace"), mtime=0)


def _samples(data: ReportData) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    rows = list(_rows(data))
    if not rows:
        return ""
    writer.writerow(("result", "figure", "contender", "number", "ms", "flagged"))
    writer.writerows([csv_text(value) if isinstance(value, str) else value for value in row] for row in rows)
    return out.getvalue()


def _rows(data: ReportData) -> Iterator[tuple[str, str, str, int, float, bool]]:
    for step in data.steps:
        source = step.provenance.source
        for name, series in step.samples_ms.items():
            flagged = set(step.flagged.get("baseline" if name == step.baseline else name, ()))
            yield from ((source, "step", name, i, time, i in flagged) for i, time in enumerate(series))
        for name, series in step.token_ms.items():
            yield from ((source, "token", name, i, time, False) for i, time in enumerate(series))
    for model in data.models:
        for cache in model.caches:
            yield from ((model.provenance.source, "model token", cache.name, i, t, False) for i, t in enumerate(cache.token_ms))
