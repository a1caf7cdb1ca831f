"""The inputs of a report as `ReportData`: every result is read by the reader that `compare` uses."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from elastickv.benchmark.result import Result
from elastickv.errors import UsageError
from elastickv.html_report.model_results import evaluation_view, model_of
from elastickv.html_report.report_data import ReportData
from elastickv.html_report.step_results import step_of
from elastickv.results.compare.result_sets import ResultSet, gather
from elastickv.results.kinds.original_result import OriginalResult
from elastickv.results.load import guarded

_STEPS = (Result, OriginalResult)


def load_report_data(inputs: Sequence[Any]) -> ReportData:
    """Return the results of all inputs.

    Parameters
    ----------
    inputs : paths, results, sweeps; each must hold at least one result.

    Raises
    ------
    UsageError : naming the file that cannot be read, is no result, lacks something, or holds none.
    """
    if not inputs:
        raise UsageError("no result is given: name files or folders of results, or sweeps")
    everything = ResultSet("the report")
    for number, one in enumerate(inputs, 1):
        results = gather(one, f"result {number}")
        if not results.runs and not results.evaluations:
            raise results.empty()
        for run, document in zip(results.runs, results.documents, strict=True):
            everything.add(run, document)
        for document, evaluation in results.evaluations:
            everything.add_evaluation(document, evaluation)
        everything.sweeps += results.sweeps
        everything.not_measured |= results.not_measured
        everything.notes += results.notes
        if results.others:
            others = ", ".join(document.source for document in results.others)
            everything.notes.append(f"not shown, being no results: {others}")
    runs, evaluations = everything.runs, everything.evaluations
    return ReportData(
        steps=[guarded(run.source, partial(step_of, run)) for run in runs if isinstance(run.result, _STEPS)],
        models=[guarded(run.source, partial(model_of, run)) for run in runs if not isinstance(run.result, _STEPS)],
        evaluations=[evaluation_view(evaluation, document.source) for document, evaluation in evaluations],
        sweeps=[(source, header.command) for source, header in everything.sweeps],
        not_measured=everything.not_measured,
        notes=list(dict.fromkeys(everything.notes)),
        documents=[*everything.documents, *(document for document, _ in evaluations)],
    )
