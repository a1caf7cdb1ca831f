"""Results from JSON values: every kind of result in one table, `KINDS`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from elastickv.benchmark.from_dict import refused
from elastickv.benchmark.result import Result
from elastickv.errors import UsageError
from elastickv.results.compare import from_results
from elastickv.results.compare.runs import BenchmarkRun
from elastickv.results.documents import Document
from elastickv.results.formats import FORMATS, baseline_table, generation_table
from elastickv.results.formats.rows import row
from elastickv.results.kinds.evaluation_result import EVALUATION_KIND, EvaluationResult
from elastickv.results.kinds.gguf_result import GGUF_KIND, GgufBaseline
from elastickv.results.kinds.model_result import (
    MODEL_BENCH_KIND,
    RUN_KIND,
    ModelBenchResult,
    RunResult,
    TransformersBaseline,
)
from elastickv.results.kinds.original_result import OriginalResult
from elastickv.results.kinds.serving_result import SERVING_KIND, ServingResult
from elastickv.results.kinds.soak_result import SOAK_KIND, SoakResult

T = TypeVar("T")
Loaded = TypeVar("Loaded", EvaluationResult, ServingResult, SoakResult)
Rows = Callable[[Any], list[dict[str, Any]]]


@dataclass(frozen=True)
class ResultKind:
    """One kind of result.

    Attributes
    ----------
    matches : whether JSON values are of this kind.
    type : the dataclass that they become.
    run : what a comparison takes of it; None where it has no times.
    rows, formats : its main figures, and the texts that it is shown as; None where `elastickv.load` does not take it.
    """

    matches: Callable[[Mapping[str, Any]], bool]
    type: Any
    run: Callable[[Any, str], BenchmarkRun] | None = None
    rows: Rows | None = None
    formats: Mapping[str, Callable[[Any], str]] | None = None


def _bench(value: Mapping[str, Any]) -> bool:
    return "benchmark_type" in value and ("schema_version" in value or value["benchmark_type"] == "elastic_kv_cache")


def _of_kind(kind: str, *keys: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda value: value.get("kind") == kind and all(key in value for key in keys)


# The first that matches counts.
KINDS: tuple[ResultKind, ...] = (
    ResultKind(_bench, Result, from_results.bench_run, lambda result: [row(result)], FORMATS),
    ResultKind(lambda value: "benchmark_type" in value and "results" in value, OriginalResult, from_results.original_run),
    ResultKind(
        _of_kind(MODEL_BENCH_KIND, "fidelity"),
        TransformersBaseline,
        from_results.model_run,
        generation_table.rows,
        baseline_table.TRANSFORMERS_FORMATS,
    ),
    ResultKind(
        _of_kind(MODEL_BENCH_KIND),
        ModelBenchResult,
        from_results.model_run,
        generation_table.rows,
        generation_table.FORMATS,
    ),
    ResultKind(_of_kind(RUN_KIND), RunResult, from_results.generation_run, generation_table.rows, generation_table.FORMATS),
    ResultKind(_of_kind(GGUF_KIND), GgufBaseline, from_results.gguf_run, baseline_table.gguf_rows, baseline_table.GGUF_FORMATS),
    ResultKind(_of_kind(EVALUATION_KIND), EvaluationResult),
    ResultKind(_of_kind(SERVING_KIND), ServingResult),
    ResultKind(_of_kind(SOAK_KIND), SoakResult),
)


def kind_of(value: Any) -> ResultKind | None:
    """Return the kind of JSON values; None where they are no result."""
    return next((kind for kind in KINDS if kind.matches(value)), None) if isinstance(value, dict) else None


def result_of(document: Document) -> Any:
    """Return what a document holds as a dataclass of `KINDS`; None where it is no result.

    Raises
    ------
    UsageError : naming the file and the key that is missing, of another type or out of range, or another version.
    """
    kind = kind_of(document.value)
    return None if kind is None else kind.type.from_dict(document.value, document.source)


def run_of(document: Document) -> BenchmarkRun | None:
    """Return what a document says as a run; None where it is no result with times.

    Raises
    ------
    UsageError : naming the file, if it is a result of another schema, lacks something or mixes units.
    """
    kind = kind_of(document.value)
    if kind is None or kind.run is None:
        return None
    run = kind.run
    return guarded(document.source, lambda: run(kind.type.from_dict(document.value, document.source), document.source))


def evaluation_of(document: Document) -> EvaluationResult | None:
    """Return a result of `eval`; None where a document is none.

    Raises
    ------
    UsageError : naming the file and the key that is missing, of another type or out of range.
    """
    return _read_as(EvaluationResult, document)


def serving_of(document: Document) -> ServingResult | None:
    """Return a result of `benchmarks/serving.py`; None where a document is none.

    Raises
    ------
    UsageError : naming the file and the key that is missing, of another type or out of range.
    """
    return _read_as(ServingResult, document)


def soak_of(document: Document) -> SoakResult | None:
    """Return a result of `benchmarks/serving_soak.py`; None where a document is none.

    Raises
    ------
    UsageError : naming the file and the key that is missing, of another type or out of range.
    """
    return _read_as(SoakResult, document)


def _read_as(result_type: type[Loaded], document: Document) -> Loaded | None:
    kind = kind_of(document.value)
    if kind is None or kind.type is not result_type:
        return None
    result: Loaded = result_type.from_dict(document.value, document.source)
    return result


def guarded(source: str, read: Callable[[], T]) -> T:
    """Return what `read` makes of a result.

    Raises
    ------
    UsageError : naming the file, also where values that are valid one by one do not fit each other.
    """
    try:
        return read()
    except UsageError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise refused(source, f"contains invalid values ({error})") from None
