"""Tables for a notebook. Whatever comes from a file is escaped."""

from collections.abc import Iterable, Sequence
from html import escape

from elastickv.errors import printable


def html_table(headers: Sequence[str], rows: Iterable[Sequence[str]], said: Iterable[str] = ()) -> str:
    """Return a table and what is said of it, a paragraph each."""
    body = "".join(_line("td", cells) for cells in rows)
    return f"<table><thead>{_line('th', headers)}</thead><tbody>{body}</tbody></table>{html_paragraphs(said)}"


def html_paragraphs(said: Iterable[str]) -> str:
    """Return a paragraph each."""
    return "".join(f"<p>{escape(printable(text))}</p>" for text in said)


def _line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(printable(text))}</{tag}>" for text in cells) + "</tr>"
