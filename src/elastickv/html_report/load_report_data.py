"""The inputs of a report as `ReportData`: every result is read by the reader that `compare` uses."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from elastickv.benchmark.result import Result
from elastickv.errors import UsageError
from elastickv.html_report.model_results import evaluation_view, model_of
from elastickv.html_report.report_data import ModelRun, ReportData, Step
from elastickv.html_report.serving_results import serving_view
from elastickv.html_report.soak_tables import soak_view
from elastickv.html_report.step_results import step_of
from elastickv.results.compare.result_sets import ResultSet, gather
from elastickv.results.documents import Document, file_of
from elastickv.results.kinds.original_result import OriginalResult
from elastickv.results.load import guarded

_STEPS = (Result, OriginalResult)


def load_report_data(inputs: Sequence[Any]) -> ReportData:
    """Return the results of all inputs.

    Parameters
    ----------
    inputs : paths, results, sweeps. What cannot be read or is no result is left out, and named in `unreadable`.

    Raises
    ------
    UsageError : naming what cannot be read or is no result, if there is nothing else.
    """
    if not inputs:
        raise UsageError("no result is given: name files or folders of results, or sweeps")
    everything = ResultSet("the report")
    for number, one in enumerate(inputs, 1):
        results = gather(one, f"result {number}")
        results.refuse_others()
        if results.empty and not results.unreadable:
            results.refuse(results.name, results.nothing_measured())
        for run, document in zip(results.runs, results.documents, strict=True):
            everything.add(run, document)
        for document, evaluation in results.evaluations:
            everything.add_evaluation(document, evaluation)
        for document, serving in results.servings:
            everything.add_serving(document, serving)
        for document, soak in results.soaks:
            everything.add_soak(document, soak)
        everything.sweeps += results.sweeps
        everything.unmeasured += results.unmeasured
        everything.incomplete += results.incomplete
        everything.notes += results.notes
        for file, reasons in results.unreadable.items():
            everything.unreadable[file] += [reason for reason in reasons if reason not in everything.unreadable[file]]
    steps, models, documents = _views(everything)
    evaluations, servings, soaks = everything.evaluations, everything.servings, everything.soaks
    if everything.empty or not (steps or models or evaluations or servings or soaks or everything.unmeasured):
        raise everything.nothing_measured()
    return ReportData(
        steps=steps,
        models=models,
        evaluations=[evaluation_view(evaluation, document.source) for document, evaluation in evaluations],
        sweeps=[(source, header.command) for source, header in everything.sweeps],
        unmeasured=list(dict.fromkeys(everything.unmeasured)),
        incomplete=list(dict.fromkeys(everything.incomplete)),
        unreadable=everything.refusals,
        notes=list(dict.fromkeys(everything.notes)),
        documents=[*documents, *(document for document, _ in [*evaluations, *servings, *soaks])],
        inputs=list(dict.fromkeys(map(file_of, _sources(everything)))),
        servings=[serving_view(serving, document.source) for document, serving in servings],
        soaks=[soak_view(soak, document.source) for document, soak in soaks],
    )


def _sources(results: ResultSet) -> Iterator[str]:
    yield from (document.source for document in results.documents)
    yield from (document.source for document, _ in results.evaluations)
    yield from (document.source for document, _ in results.servings)
    yield from (document.source for document, _ in results.soaks)
    yield from (source for source, _ in results.sweeps)
    yield from (cell.sweep for cell in results.unmeasured)
    yield from results.unreadable


def _views(results: ResultSet) -> tuple[list[Step], list[ModelRun], list[Document]]:
    """Return what the page shows of the runs, and their documents; a run whose values do not fit each other is left out."""
    steps: list[Step] = []
    models: list[ModelRun] = []
    documents = []
    for run, document in zip(results.runs, results.documents, strict=True):
        try:
            if isinstance(run.result, _STEPS):
                steps.append(guarded(run.source, partial(step_of, run)))
            else:
                models.append(guarded(run.source, partial(model_of, run)))
        except UsageError as error:
            results.refuse(run.source, error)
        else:
            documents.append(document)
    return steps, models, documents
