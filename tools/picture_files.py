"""The pictures of the documents, drawn from results: a file is written again when its result has changed."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from elastickv.html_report.charts.style import Chart

ASSETS = Path(__file__).resolve().parents[1] / "docs" / "assets"
_MARK = "<!-- of results "


def picture_name(path: Path) -> str:
    """Return the name of a result's picture; a plus would be written otherwise in the address of a page."""
    return f"{path.stem.replace('+', '-and-')}.svg"


def stale_pictures(drawn: Iterable[tuple[Path, Chart]], write: bool) -> list[Path]:
    """Return the pictures whose results have changed; write them, if wanted."""
    stale = []
    for path, chart in drawn:
        picture = ASSETS / picture_name(path)
        mark = f"{_MARK}{hashlib.sha256(path.read_bytes()).hexdigest()} -->\n"
        if picture.exists() and picture.read_text(encoding="utf-8").endswith(mark):
            continue
        stale.append(picture)
        if write:
            picture.write_text(chart.svg() + mark, encoding="utf-8")
    return stale
