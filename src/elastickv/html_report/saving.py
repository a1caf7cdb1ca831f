"""A report as files: each appears whole or not at all, the page itself last."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from elastickv.errors import UsageError
from elastickv.html_report.content import Content
from elastickv.html_report.markdown import markdown_of
from elastickv.html_report.picture import picture
from elastickv.html_report.report_data import ReportData
from elastickv.results.files import check_writable, write_bytes, write_text


class SavableReport(Protocol):
    """What is saved of a report."""

    @property
    def facts(self) -> ReportData:
        """Its results."""

    @property
    def content(self) -> Content:
        """Its headline and sections."""

    @property
    def figures(self) -> Mapping[str, str]:
        """Its charts as SVG, by name."""

    @property
    def html(self) -> str:
        """The page."""

    @property
    def printable(self) -> str:
        """The page laid out for paper."""


def save(report: SavableReport, path: Path, shown: str) -> None:
    """Write a report in one of `FORMATS`.

    Raises
    ------
    UsageError : if it cannot be written, or would overwrite a result that it is made of.
    """
    check_target(report, path)
    if shown == "png":
        write_bytes(path, picture(report.content))
    elif shown == "md":
        _save_markdown(report, path)
    else:
        write_text(path, report.printable if shown == "pdf-ready" else report.html)


def check_target(report: SavableReport, path: Path) -> None:
    """Refuse a path that cannot be written or is one of the results.

    Raises
    ------
    UsageError : saying what to give instead.
    """
    check_writable(path)
    for source in map(Path, report.facts.inputs):
        if path.exists() and source.exists() and path.samefile(source):
            raise UsageError(f"`path` {path} is one of the results: give another name")


def _save_markdown(report: SavableReport, path: Path) -> None:
    folder = path.with_name(f"{path.stem}-figures")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"`path` {path}: its figures' folder {folder} is a file; give another name")
    made = not folder.exists()
    figures = dict(report.figures)
    try:
        folder.mkdir(exist_ok=True)
        for name, svg in figures.items():
            write_text(folder / f"{name}.svg", svg)
        write_text(path, markdown_of(report.content, quote(folder.name)))
    except (OSError, UsageError) as error:
        if made and folder.is_dir():
            for name in figures:
                (folder / f"{name}.svg").unlink(missing_ok=True)
            folder.rmdir()
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"`path` {path}: {error.strerror or error}; choose another folder") from None
