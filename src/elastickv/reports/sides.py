"""One side of a comparison: the runs of a file, a folder or a sweep, or results in memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastickv.errors import UsageError
from elastickv.reports.documents import Document, documents
from elastickv.reports.readers import run_of
from elastickv.reports.runs import Run


@dataclass
class Side:
    """What stands on one side.

    Attributes
    ----------
    name : how messages call it: the path that was given.
    runs : what was measured.
    not_measured : cells of a sweep that have no result, and why.
    notes : what was left out, a line each.
    """

    name: str
    runs: list[Run] = field(default_factory=list)
    not_measured: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_side(given: Any, name: str) -> Side:
    """Return what is given as one side.

    Parameters
    ----------
    given : a path, a result or a sweep (as a value, or its JSON as a dictionary), or several of them.
    name : what to call it where it is no path.

    Raises
    ------
    UsageError : naming the file that cannot be read, is no result, or holds none.
    """
    side = Side(str(given) if isinstance(given, (str, Path)) else name)
    others = []
    for document in _documents(given, side):
        run = run_of(document)
        if run is not None:
            known = next((other.source for other in side.runs if run.copies(other)), None)
            if known is None:
                side.runs.append(run)
            else:
                side.notes.append(f"{run.source} is the run of {known} once more, and counts once")
        elif _is_cell(document.value):
            cell = " ".join(f"{key}={value}" for key, value in document.value["cell"].items())
            side.not_measured[cell] = str(document.value.get("reason") or document.value["status"])
        elif not _is_header(document):
            others.append(document.source)
    if not side.runs:
        held = f"{len(side.not_measured)} cells, none of them measured" if side.not_measured else "no result"
        raise UsageError(f"{side.name} holds {held}: give a result of `elastickv bench`, a sweep, or a folder of them")
    if others:
        side.notes.append(f"not compared, being no results: {', '.join(others)}")
    return side


def _documents(given: Any, side: Side) -> Iterator[Document]:
    if isinstance(given, (str, Path)):
        for document in documents(Path(given), side.notes):
            yield from _cells(document)
    elif hasattr(given, "as_dict"):
        yield from _cells(Document(side.name, given.as_dict()))
    elif isinstance(given, dict):
        yield from _cells(Document(side.name, given))
    elif isinstance(given, Iterable):
        for one in given:
            yield from _documents(one, side)
    else:
        raise UsageError(f"{side.name} is a {type(given).__name__}: give a path, a result, or several of either")


def _cells(document: Document) -> Iterator[Document]:
    """Yield the cells of a whole sweep in one JSON object; anything else as it is."""
    value = document.value
    if isinstance(value, dict) and "sweep" in value and isinstance(value.get("cells"), list):
        for number, cell in enumerate(value["cells"], 1):
            yield Document(f"{document.source}, cell {number}", cell)
    else:
        yield document


def _is_cell(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("cell"), dict) and "status" in value


def _is_header(document: Document) -> bool:
    """Whether it is the line that a sweep begins with, which says what was to be measured."""
    return isinstance(document.value, dict) and "sweep" in document.value
