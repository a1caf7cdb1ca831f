"""The content of the page: a headline, sections of charts and tables, and the sections that have no data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from elastickv.html_report.charts.style import Chart
from elastickv.html_report.headline import Headline

_NARROW = 5  # columns


@dataclass(frozen=True)
class Table:
    """A table: its caption, and its cells as text. Columns whose header is in `numbers` are set right."""

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[str] = ()


def tables(caption: str, rows: Iterable[Mapping[str, str]], words: Sequence[str]) -> list[Table]:
    """Return a table of rows, which have the same columns, without those that are empty; none where there is no row.

    Parameters
    ----------
    words : columns that hold text; the others hold numbers.
    """
    listed = list(rows)
    headers = [name for name in (listed[0] if listed else ()) if any(row[name] for row in listed)]
    cells = [[row[name] for name in headers] for row in listed]
    return [Table(caption, headers, cells, [name for name in headers if name not in words])] if headers else []


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes
    ----------
    name : its anchor.
    how : how to read it, in a sentence or two.
    notes : sentences below the tables.
    commands : (results, command) pairs.
    missing : the results that an empty section needs.
    """

    name: str
    title: str
    how: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    commands: Sequence[tuple[str, str]] = ()
    missing: str = ""

    @property
    def empty(self) -> bool:
        """Whether there was nothing to show."""
        return not self.charts and not self.tables and not self.commands

    @property
    def narrow(self) -> bool:
        """Whether the first table is narrow enough to share a row with a single chart."""
        return bool(self.tables) and len(self.charts) % 2 == 1 and len(self.tables[0].headers) <= _NARROW


@dataclass(frozen=True)
class Content:
    """A whole page."""

    title: str
    headline: Headline
    sections: Sequence[Section]
    absent: Sequence[Section] = ()

    def is_half(self, section: Section) -> bool:
        """Whether a section is one of two neighbors with one chart each, which share a row where there is room."""
        alone = [len(one.charts) == 1 and not one.tables and not one.commands for one in self.sections]
        place = before = self.sections.index(section)
        while before and alone[before - 1]:
            before -= 1
        run = len(alone[before:]) if all(alone[before:]) else alone[before:].index(False)
        return alone[place] and place - before < run - run % 2

    @property
    def charts(self) -> list[Chart]:
        """All of them, in order."""
        return [chart for section in self.sections for chart in section.charts]
