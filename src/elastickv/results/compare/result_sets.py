"""The inputs of a comparison or a report: the runs of a file, a folder or a sweep, or results in memory.

What cannot be read is left out and named in `ResultSet.unreadable`; everything else is read.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastickv.errors import UsageError
from elastickv.inputs import file_path
from elastickv.results.compare.runs import BenchmarkRun
from elastickv.results.documents import ACCEPTED, Document, documents, file_of
from elastickv.results.kinds.evaluation_result import EvaluationResult
from elastickv.results.kinds.serving_result import ServingResult
from elastickv.results.kinds.soak_result import SoakResult
from elastickv.results.kinds.sweep_record import MISSING, SweepCell, SweepHeader, UnmeasuredCell, cell_name, sweep_record
from elastickv.results.load import evaluation_of, run_of, serving_of, soak_of

_IN_JSON = re.compile(r", cell [0-9]+\Z")  # of a sweep that is one JSON object


@dataclass
class ResultSet:
    """The results of one input.

    Attributes
    ----------
    name : how messages call it: the path, where it is one.
    runs : what was measured.
    documents : what the runs were read from, one each.
    evaluations : results of `eval`, with their documents.
    servings, soaks : results of `benchmarks/serving.py` and `benchmarks/serving_soak.py`, with their documents.
    sweeps : the source and the header of each sweep.
    unmeasured : cells of sweeps that have no result, the missing ones among them.
    incomplete : a sentence for each sweep that lacks cells.
    others : the sources of what is JSON, but no result.
    notes : what was left out although it is a result, a line each.
    unreadable : file -> why it, or a line of it, cannot be read.
    """

    name: str
    runs: list[BenchmarkRun] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    evaluations: list[tuple[Document, EvaluationResult]] = field(default_factory=list)
    servings: list[tuple[Document, ServingResult]] = field(default_factory=list)
    soaks: list[tuple[Document, SoakResult]] = field(default_factory=list)
    sweeps: list[tuple[str, SweepHeader]] = field(default_factory=list)
    unmeasured: list[UnmeasuredCell] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unreadable: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def empty(self) -> bool:
        """Whether nothing was measured, and no cell says why not."""
        measured = self.runs or self.evaluations or self.servings or self.soaks
        return not (measured or any(cell.status != MISSING for cell in self.unmeasured))

    @property
    def not_measured(self) -> dict[str, str]:
        """Cells that have no result, and why; with the sweep where two have a cell of one name."""
        return cells_by_name(self.unmeasured)

    @property
    def refusals(self) -> list[str]:
        """What cannot be read and why, a line each file."""
        return [_refusal(reasons) for reasons in self.unreadable.values()]

    def refuse_others(self) -> None:
        """Leave out what is no result as what cannot be read."""
        for source in self.others:
            self.refuse(source, UsageError(f"{source} holds no results: give {ACCEPTED}"))
        self.others.clear()

    def refuse(self, source: str, error: UsageError) -> None:
        """Leave a file, or a line of it, out."""
        self.unreadable[file_of(source)].append(str(error))

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

    def add_serving(self, document: Document, serving: ServingResult) -> None:
        """Add a result of `benchmarks/serving.py`, or a note that it is there already."""
        known = next((other.source for other, same in self.servings if same == serving), None)
        if known is None:
            self.servings.append((document, serving))
        else:
            self.notes.append(f"{document.source} is the result of {known} once more, and counts once")

    def add_soak(self, document: Document, soak: SoakResult) -> None:
        """Add a result of `benchmarks/serving_soak.py`, or a note that it is there already."""
        known = next((other.source for other, same in self.soaks if same == soak), None)
        if known is None:
            self.soaks.append((document, soak))
        else:
            self.notes.append(f"{document.source} is the result of {known} once more, and counts once")

    def nothing_measured(self) -> UsageError:
        """Return the error that says that nothing was measured, and why."""
        if self.unreadable:
            first, *others = self.refusals
            more = f"; and {len(others)} more files cannot be read" if others else ""
            return UsageError(f"{first}{more}")
        content = "no result" if self.empty else f"{len(self.unmeasured)} cells, none of them measured"
        return UsageError(f"{self.name} holds {content}: give {ACCEPTED}")


def cells_by_name(cells: Iterable[UnmeasuredCell]) -> dict[str, str]:
    """Return the reason of each cell by its name; with the sweep where two have a cell of one name."""
    named: dict[str, str] = {}
    for cell in cells:
        named[f"{cell.cell} of {cell.sweep}" if cell.cell in named else cell.cell] = cell.why
    return named


def read_result_set(source: Any, name: str) -> ResultSet:
    """Return one input of a comparison.

    Parameters
    ----------
    source : a path, a result or a sweep (as a value, or its JSON as a dictionary), or several of them.
    name : what to call it where it is no path.

    Raises
    ------
    UsageError : naming what cannot be read or is no result, if there is no run.
    """
    results = gather(source, name)
    results.refuse_others()
    if not results.runs:
        raise results.nothing_measured()
    others = [*results.evaluations, *results.servings, *results.soaks]
    if others:
        without_times = ", ".join(document.source for document, _ in others)
        results.notes.append(f"not compared, being no results of `bench`: {without_times}")
    return results


def gather(source: Any, name: str) -> ResultSet:
    """Return the results of one input, as `read_result_set` does, but accept an input without runs.

    Raises
    ------
    UsageError : if it is neither a path nor a result.
    """
    results = ResultSet(str(source) if isinstance(source, (str, Path)) else name)
    sweep = _OpenSweep(results)
    for document in _documents(source, results):
        sweep.follow(document)
        try:
            _take(document, results, sweep)
        except UsageError as error:
            results.refuse(document.source, error)
    sweep.close()
    return results


class _OpenSweep:
    """The sweep whose lines are being read: its header, and the cells that follow it in the same file."""

    def __init__(self, results: ResultSet) -> None:
        self._results = results
        self._source, self._header = "", SweepHeader()
        self._cells: list[dict[str, Any]] = []

    def begin(self, source: str, header: SweepHeader) -> None:
        """Take up the cells that follow a header."""
        self.close()
        self._source, self._header = file_of(source), header
        self._results.sweeps.append((source, header))

    def follow(self, document: Document) -> None:
        """Close the sweep at the first document of another file; count a cell, whatever became of it."""
        base, value = _IN_JSON.sub("", file_of(document.source)), document.value
        if base != self._source:
            self.close()
        elif isinstance(value, dict) and isinstance(value.get("cell"), dict):
            self._cells.append(value["cell"])

    def close(self) -> None:
        """Add the cells that the sweep lacks to the results."""
        missing = self._header.missing(self._cells)
        if self._source and not self._cells:
            planned = f"0 of {missing.planned} planned cells are in it" if missing.planned else f"give {ACCEPTED}"
            self._results.refuse(self._source, UsageError(f"{self._source} holds no result: {planned}"))
        elif missing.count:
            self._results.incomplete.append(missing.sentence(self._source))
        for record in missing.records():
            cell = UnmeasuredCell(self._source, cell_name(record["cell"]), MISSING, record["reason"])
            self._results.unmeasured.append(cell)
        self._source, self._header, self._cells = "", SweepHeader(), []


def _take(document: Document, results: ResultSet, sweep: _OpenSweep) -> None:
    """Add what a document holds to the results."""
    run, evaluation = run_of(document), evaluation_of(document)
    if run is not None:
        results.add(run, document)
    elif evaluation is not None:
        results.add_evaluation(document, evaluation)
    elif (serving := serving_of(document)) is not None:
        results.add_serving(document, serving)
    elif (soak := soak_of(document)) is not None:
        results.add_soak(document, soak)
    elif isinstance(record := sweep_record(document.value, document.source), SweepCell):
        results.unmeasured.append(UnmeasuredCell(file_of(document.source), record.name, record.status, record.why))
    elif record is not None:
        sweep.begin(document.source, record)
    else:
        results.others.append(document.source)


def _refusal(reasons: list[str]) -> str:
    more = len(reasons) - 1
    return f"{reasons[0]} (and {more} more of its lines cannot be read)" if more else reasons[0]


def _documents(source: Any, results: ResultSet) -> Iterator[Document]:
    if isinstance(source, (str, Path)):
        for document in documents(file_path(source), results.notes, results.refuse):
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
