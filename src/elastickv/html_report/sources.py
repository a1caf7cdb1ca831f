"""From what is given to facts: every result is read by the reader that `compare` uses."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from elastickv.errors import UsageError
from elastickv.html_report.model_results import evaluation_of, is_evaluation, model_of
from elastickv.html_report.report_data import ReportData
from elastickv.html_report.step_results import step_of
from elastickv.results.compare.result_sets import ResultSet, gather
from elastickv.results.compare.runs import BenchmarkRun
from elastickv.results.documents import Document
from elastickv.results.readers import guarded


def load_report_data(given: Sequence[Any]) -> ReportData:
    """Return what is given as facts.

    Parameters
    ----------
    given : paths, results, sweeps; each must hold at least one result.

    Raises
    ------
    UsageError : naming the file that cannot be read, is no result, lacks something, or holds none.
    """
    if not given:
        raise UsageError("no result is given: name files or folders of results, or sweeps")
    whole = ResultSet("the report")
    evaluations: list[Document] = []
    for number, one in enumerate(given, 1):
        side = gather(one, f"result {number}")
        found = [document for document in side.others if is_evaluation(document)]
        if not side.runs and not found:
            raise side.empty()
        for run, document in zip(side.runs, side.documents, strict=True):
            whole.add(run, document)
        for document in found:
            _add_once(document, evaluations, whole)
        whole.sweeps += side.sweeps
        whole.not_measured |= side.not_measured
        whole.notes += side.notes
        others = [document.source for document in side.others if not is_evaluation(document)]
        if others:
            whole.notes.append(f"not shown, being no results: {', '.join(others)}")
    pairs: list[tuple[Document, BenchmarkRun]] = list(zip(whole.documents, whole.runs, strict=True))
    return ReportData(
        steps=[guarded(d, partial(step_of, d, run)) for d, run in pairs if "caches" not in d.value],
        models=[guarded(d, partial(model_of, d, run)) for d, run in pairs if "caches" in d.value],
        evaluations=[guarded(d, partial(evaluation_of, d)) for d in evaluations],
        sweeps=[(document.source, _command(document)) for document in whole.sweeps],
        not_measured=whole.not_measured,
        notes=list(dict.fromkeys(whole.notes)),
        documents=[*whole.documents, *evaluations],
    )


def _add_once(document: Document, known: list[Document], whole: ResultSet) -> None:
    same = next((other.source for other in known if other.value == document.value), None)
    if same is None:
        known.append(document)
    else:
        whole.notes.append(f"{document.source} is the result of {same} once more, and counts once")


def _command(document: Document) -> Sequence[str]:
    header = document.value["sweep"]
    command = header.get("command") if isinstance(header, dict) else None
    return [str(word) for word in command] if isinstance(command, list) else []
