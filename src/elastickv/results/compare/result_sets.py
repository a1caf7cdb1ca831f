"""What is given to a comparison or a report: the runs of a file, a folder or a sweep, or results in memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastickv.errors import UsageError
from elastickv.results.compare.runs import BenchmarkRun
from elastickv.results.documents import Document, documents
from elastickv.results.readers import run_of


@dataclass
class ResultSet:
    """What stands on one side.

    Attributes
    ----------
    name : how messages call it: the path that was given.
    runs : what was measured.
    documents : what the runs were read from, one each.
    sweeps : the lines that sweeps begin with, which say what was to be measured.
    others : what is JSON, but no run.
    not_measured : cells of a sweep that have no result, and why.
    notes : what was left out, a line each.
    """

    name: str
    runs: list[BenchmarkRun] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    sweeps: list[Document] = field(default_factory=list)
    others: list[Document] = field(default_factory=list)
    not_measured: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, run: BenchmarkRun, document: Document) -> None:
        """Add a run, or a note that it is there already."""
        known = next((other.source for other in self.runs if run.copies(other)), None)
        if known is None:
            self.runs.append(run)
            self.documents.append(document)
        else:
            self.notes.append(f"{run.source} is the run of {known} once more, and counts once")

    def empty(self) -> UsageError:
        """Return the error that says that nothing was measured."""
        held = f"{len(self.not_measured)} cells, none of them measured" if self.not_measured else "no result"
        return UsageError(f"{self.name} holds {held}: give a result of `elastickv bench`, a sweep, or a folder of them")


def read_result_set(given: Any, name: str) -> ResultSet:
    """Return what is given as one side of a comparison.

    Parameters
    ----------
    given : a path, a result or a sweep (as a value, or its JSON as a dictionary), or several of them.
    name : what to call it where it is no path.

    Raises
    ------
    UsageError : naming the file that cannot be read, is no result, or holds none.
    """
    side = gather(given, name)
    if not side.runs:
        raise side.empty()
    if side.others:
        side.notes.append(f"not compared, being no results: {', '.join(other.source for other in side.others)}")
    return side


def gather(given: Any, name: str) -> ResultSet:
    """Return what is given, as `read_result_set` does, runs or none.

    Raises
    ------
    UsageError : naming the file that cannot be read, or a result that lacks something.
    """
    side = ResultSet(str(given) if isinstance(given, (str, Path)) else name)
    for document in _documents(given, side):
        run = run_of(document)
        if run is not None:
            side.add(run, document)
        elif _is_cell(document.value):
            cell = " ".join(f"{key}={value}" for key, value in document.value["cell"].items())
            side.not_measured[cell] = str(document.value.get("reason") or document.value["status"])
        elif _is_header(document):
            side.sweeps.append(document)
        else:
            side.others.append(document)
    return side


def _documents(given: Any, side: ResultSet) -> Iterator[Document]:
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
    """Yield the header and the cells of a whole sweep in one JSON object; anything else as it is."""
    value = document.value
    if isinstance(value, dict) and "sweep" in value and isinstance(value.get("cells"), list):
        yield Document(document.source, {"sweep": value["sweep"]})
        for number, cell in enumerate(value["cells"], 1):
            yield Document(f"{document.source}, cell {number}", cell)
    else:
        yield document


def _is_cell(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("cell"), dict) and "status" in value


def _is_header(document: Document) -> bool:
    """Whether it is the line that a sweep begins with, which says what was to be measured."""
    return isinstance(document.value, dict) and "sweep" in document.value
