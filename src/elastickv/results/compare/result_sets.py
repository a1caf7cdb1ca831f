"""The inputs of a comparison or a report: the runs of a file, a folder or a sweep, or results in memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastickv.errors import UsageError
from elastickv.results.compare.runs import BenchmarkRun
from elastickv.results.documents import Document, documents
from elastickv.results.kinds.evaluation_result import EvaluationResult
from elastickv.results.kinds.sweep_record import SweepCell, SweepHeader, sweep_record
from elastickv.results.load import evaluation_of, run_of


@dataclass
class ResultSet:
    """The results of one input.

    Attributes
    ----------
    name : how messages call it: the path, where it is one.
    runs : what was measured.
    documents : what the runs were read from, one each.
    evaluations : results of `eval`, with their documents.
    sweeps : the source and the header of each sweep.
    others : what is JSON, but no result.
    not_measured : cells of a sweep that have no result, and why.
    notes : what was left out, a line each.
    """

    name: str
    runs: list[BenchmarkRun] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    evaluations: list[tuple[Document, EvaluationResult]] = field(default_factory=list)
    sweeps: list[tuple[str, SweepHeader]] = field(default_factory=list)
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

    def add_evaluation(self, document: Document, evaluation: EvaluationResult) -> None:
        """Add a result of `eval`, or a note that it is there already."""
        known = next((other.source for other, same in self.evaluations if same == evaluation), None)
        if known is None:
            self.evaluations.append((document, evaluation))
        else:
            self.notes.append(f"{document.source} is the result of {known} once more, and counts once")

    def empty(self) -> UsageError:
        """Return the error that says that nothing was measured."""
        content = f"{len(self.not_measured)} cells, none of them measured" if self.not_measured else "no result"
        return UsageError(f"{self.name} holds {content}: give a result of `elastickv bench`, a sweep, or a folder of them")


def read_result_set(source: Any, name: str) -> ResultSet:
    """Return one input of a comparison.

    Parameters
    ----------
    source : a path, a result or a sweep (as a value, or its JSON as a dictionary), or several of them.
    name : what to call it where it is no path.

    Raises
    ------
    UsageError : naming the file that cannot be read, is no result, or holds none.
    """
    results = gather(source, name)
    if not results.runs:
        raise results.empty()
    others = [document.source for document in (*results.others, *(document for document, _ in results.evaluations))]
    if others:
        results.notes.append(f"not compared, being no results: {', '.join(others)}")
    return results


def gather(source: Any, name: str) -> ResultSet:
    """Return the results of one input, as `read_result_set` does, but accept an input without runs.

    Raises
    ------
    UsageError : naming the file that cannot be read, or a result that lacks something.
    """
    results = ResultSet(str(source) if isinstance(source, (str, Path)) else name)
    for document in _documents(source, results):
        run, evaluation = run_of(document), evaluation_of(document)
        record = sweep_record(document.value, document.source) if run is None and evaluation is None else None
        if run is not None:
            results.add(run, document)
        elif evaluation is not None:
            results.add_evaluation(document, evaluation)
        elif isinstance(record, SweepCell):
            results.not_measured[record.name] = record.why
        elif record is not None:
            results.sweeps.append((document.source, record))
        else:
            results.others.append(document)
    return results


def _documents(source: Any, results: ResultSet) -> Iterator[Document]:
    if isinstance(source, (str, Path)):
        for document in documents(Path(source), results.notes):
            yield from _cells(document)
    elif hasattr(source, "as_dict"):
        yield from _cells(Document(results.name, source.as_dict()))
    elif isinstance(source, dict):
        yield from _cells(Document(results.name, source))
    elif isinstance(source, Iterable):
        for one in source:
            yield from _documents(one, results)
    else:
        raise UsageError(f"{results.name} is a {type(source).__name__}: give a path, a result, or several of either")


def _cells(document: Document) -> Iterator[Document]:
    """Yield the header and the cells of a whole sweep in one JSON object; anything else as it is."""
    value = document.value
    if isinstance(value, dict) and "sweep" in value and isinstance(value.get("cells"), list):
        yield Document(document.source, {"sweep": value["sweep"]})
        for number, cell in enumerate(value["cells"], 1):
            yield Document(f"{document.source}, cell {number}", cell)
    else:
        yield document
