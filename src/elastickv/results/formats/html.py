"""Tables for a notebook. Whatever comes from a file is escaped."""

from collections.abc import Iterable, Sequence
from html import escape

from elastickv.errors import printable


def html_table(headers: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """Return a table, then a paragraph for each note."""
    body = "".join(_line("td", cells) for cells in rows)
    return f"<table><thead>{_line('th', headers)}</thead><tbody>{body}</tbody></table>{html_paragraphs(notes)}"


def html_paragraphs(texts: Iterable[str]) -> str:
    """Return a paragraph each."""
    return "".join(f"<p>{escape(printable(text))}</p>" for text in texts)


def _line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(printable(text))}</{tag}>" for text in cells) + "</tr>"
