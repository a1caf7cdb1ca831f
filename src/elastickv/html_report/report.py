"""`elastickv.report`: results as a page."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from elastickv.errors import UsageError
from elastickv.html_report.content import Content
from elastickv.html_report.downloads import downloads
from elastickv.html_report.load_report_data import load_report_data
from elastickv.html_report.markdown import markdown_of
from elastickv.html_report.render import render, render_fragment
from elastickv.html_report.report_data import ReportData
from elastickv.html_report.report_rows import as_dict, rows_of
from elastickv.html_report.saving import save
from elastickv.html_report.sections import content_of
from elastickv.inputs import file_path
from elastickv.results.formats.plain_json import dumps
from elastickv.results.formats.rows import frame

FORMATS = ("html", "md", "pdf-ready", "png")
_SUFFIXES = {".html": "html", ".htm": "html", ".md": "md", ".markdown": "md", ".png": "png"}


@dataclass(frozen=True)
class Report:
    """Results as a page; shows itself in a notebook.

    Attributes
    ----------
    facts : its results.
    content : headline and sections.
    """

    facts: ReportData
    content: Content

    @cached_property
    def figures(self) -> Mapping[str, str]:
        """Every chart as SVG, by its name."""
        return _drawn(self.content, lambda done, total: None)

    @cached_property
    def html(self) -> str:
        """The page: one file that fetches nothing."""
        return self._page(printed=False)

    @cached_property
    def printable(self) -> str:
        """The page laid out for paper: light, everything open."""
        return self._page(printed=True)

    @cached_property
    def markdown(self) -> str:
        """Headline and tables as Markdown, with the figures as files of the folder `report-figures`."""
        return markdown_of(self.content, "report-figures")

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each figure that was measured, all with the same columns; None where there is none."""
        return rows_of(self.facts)

    def to_json(self) -> str:
        """Return headline, sections and rows as indented JSON."""
        return dumps(as_dict(self.facts, self.content))

    def to_pandas(self) -> Any:
        """Return the rows as a `pandas.DataFrame`.

        Raises
        ------
        UsageError : if pandas is not installed.
        """
        return frame(self.rows())

    def save(
        self,
        path: Path | str,
        format: str | None = None,  # noqa: A002
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write the report.

        Parameters
        ----------
        path : the file; Markdown also writes a folder of figures, named after it.
        format : 'html', 'md', 'pdf-ready' or 'png'; None goes by the suffix, and is 'html' where it says nothing.
        progress : called with (charts drawn, charts).

        Raises
        ------
        UsageError : if the format is unknown or does not go with the suffix, or the file cannot be written.
        """
        path = file_path(path)
        shown = chosen_format(path, format)
        if progress is not None and shown != "png":
            vars(self)["figures"] = _drawn(self.content, progress)
        save(self, path, shown)

    def _page(self, printed: bool) -> str:
        return render(self.content, dict(self.figures), downloads(self.facts), printed=printed)

    def _repr_html_(self) -> str:
        return render_fragment(self.content, dict(self.figures))


def _drawn(content: Content, progress: Callable[[int, int], None]) -> Mapping[str, str]:
    """Return every chart as SVG, by its name."""
    svgs: dict[str, str] = {}
    for chart in content.charts:
        svgs[chart.name] = chart.svg()
        progress(len(svgs), len(content.charts))
    return svgs


def report(*results: Any, title: str | None = None) -> Report:
    """Return a page of results.

    Parameters
    ----------
    *results : paths of results, sweeps or folders; results in memory (anything with `as_dict`, or their JSON as a dictionary);
        sweeps; lists of these. What cannot be read or holds no result is left out, named on the page and in a warning.
    title : what the page is called; None names the device.

    Raises
    ------
    UsageError : naming what cannot be read or holds no result, if there is nothing else; if jinja2 or matplotlib is missing.
    """
    made = made_of(results, title)
    for reason in made.facts.unreadable:
        warnings.warn(f"left out of the report: {reason}", stacklevel=2)
    return made


def made_of(results: Sequence[Any], title: str | None = None) -> Report:
    """Return a page of results as `report` does, without a warning of what is left out: `facts.unreadable` has it.

    Raises
    ------
    UsageError : as `report`.
    """
    check_installed()
    data = load_report_data(results)
    return Report(data, content_of(data, title))


def check_installed() -> None:
    """Refuse to go on without what draws and writes the page.

    Raises
    ------
    UsageError : naming what is missing, and the command that installs it.
    """
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise UsageError(f'a report needs {" and ".join(missing)}: pip install "elastickv[report]"')


def chosen_format(path: Path, wanted: str | None) -> str:
    """Return the requested format, or the one that the path's suffix names.

    Raises
    ------
    UsageError : if it is unknown, or the suffix is that of another one.
    """
    if wanted is not None and wanted not in FORMATS:
        raise UsageError(f"`format` {wanted} is unknown: choose {', '.join(FORMATS)}")
    suffix = path.suffix.lower()
    if suffix == ".pdf":
        raise UsageError(f"`path` {path}: no PDF is written; `format=pdf-ready` with report.html is a page to print as one")
    named = _SUFFIXES.get(suffix)
    if wanted is None:
        return named or "html"
    if named is not None and named != wanted.replace("pdf-ready", "html"):
        raise UsageError(f"`path` {path} names {named}, and `format` is {wanted}: leave one of them out")
    return wanted
