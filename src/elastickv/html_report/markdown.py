"""The page as Markdown, for a README, with its figures in a folder."""

from collections.abc import Iterator, Sequence

from elastickv.errors import printable
from elastickv.html_report.content import Content, Section, Table

# What Markdown, or the HTML in it, would take for more than text.
_SPECIAL = str.maketrans({char: "\\" + char for char in "\\`*_[]<>|#!~$"} | {"&": "&amp;", "\n": " ", "\r": " "})


def markdown_of(content: Content, folder: str) -> str:
    """Return the page as Markdown.

    Parameters
    ----------
    folder : where the figures are, seen from the file.
    """
    return "\n".join(_lines(content, folder)) + "\n"


def _lines(content: Content, folder: str) -> Iterator[str]:
    headline = content.headline
    yield f"# {text(content.title)}"
    yield from ("", f"**{text(headline.sentence)}**", "")
    yield from (text(sentence) for sentence in headline.beside)
    for section in content.sections:
        yield from _section(section, folder)
    if content.absent:
        yield from ("", "## Not in this report", "")
        yield from (f"- {text(section.title)}: needs {text(section.missing)}" for section in content.absent)


def _section(section: Section, folder: str) -> Iterator[str]:
    yield from ("", f"## {text(section.title)}", "", text(section.how))
    for chart in section.charts:
        yield from ("", f"![{text(chart.alt)}]({folder}/{chart.name}.svg)")
    for table in section.tables:
        yield from ("", f"{text(table.caption)}:", "", *_table(table))
    if section.notes:
        yield from ("", *(f"- {text(note)}" for note in section.notes))


def _table(table: Table) -> Iterator[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(text, cells)) + " |"

    yield line(table.headers)
    yield "|" + "|".join(" ---: " if header in table.numbers else " --- " for header in table.headers) + "|"
    yield from map(line, table.rows)


def text(value: str) -> str:
    """Return a text that Markdown shows as it is."""
    return printable(value).translate(_SPECIAL)
