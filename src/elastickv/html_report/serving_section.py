"""The section on vLLM with each kind of KV cache."""

from collections.abc import Iterator

from elastickv.html_report.content import Section, tables
from elastickv.html_report.report_data import ReportData
from elastickv.html_report.soak_tables import soak_tables
from elastickv.results.formats.units import duration, fixed, interval, size
from elastickv.results.kinds.serving_result import ServingContender, ServingResult

_TEXT = ("model", "cache", "attention backend", "result")
_FLASH = "FlashAttention"


def serving(data: ReportData) -> Section:
    """Return decode steps, capacity, throughput at capacity, first token and start-up."""
    return Section(
        "serving",
        "Serving with vLLM",
        "The same server with each kind of KV cache, in processes that took turns. A time divided by the baseline's is below 1 "
        "where it is faster, a throughput above 1; in brackets the least and the greatest of single rounds, not a confidence "
        "interval. Bytes are those of all layers that ElasticKV serves; a layer's step is at an anchor where it lists pages "
        "anew. Capacity is what vLLM itself counts on, throughput what ran with as many requests as fit.",
        tables=[
            *tables("A decode step", _steps(data), _TEXT),
            *tables("Bytes of the KV cache that decode steps read", _reads(data), _TEXT),
            *tables("Tokens of KV cache in the same memory, by the context of the requests", _capacities(data), _TEXT),
            *tables("Decoding with as many requests as fit", _throughputs(data), _TEXT),
            *tables("Start-up, memory, and the first token of a long prompt", _startups(data), _TEXT),
            *soak_tables(data),
        ],
        notes=list(_notes(data)),
        missing="a result of benchmarks/serving.py or serving_soak.py",
    )


def _notes(data: ReportData) -> Iterator[str]:
    for result in (one.result for one in data.servings):
        cache = "prompts were computed" if result.settings.prefill else "caches were filled with copies of one prompt's blocks"
        yield f"{result.model}: weights are {result.weights}, {cache}, the baseline is {result.baseline}."


def _contenders(data: ReportData) -> Iterator[tuple[ServingResult, ServingContender, dict[str, str], dict[str, str]]]:
    """Yield each contender with its result, and the columns that every table begins and ends with."""
    for one in data.servings:
        for contender in one.result.contenders:
            begin = {"model": one.result.model, "cache": contender.contender}
            yield one.result, contender, begin, {"result": data.names[one.provenance.source]}


def _steps(data: ReportData) -> Iterator[dict[str, str]]:
    for _, contender, begin, end in _contenders(data):
        for step in contender.steps:
            yield (
                begin
                | {
                    "context × batch": f"{step.context} × {step.batch}",
                    "a step": duration(step.ms),
                    "time / baseline": interval(step.of_baseline),
                    "samples": str(sum(map(len, step.samples))),
                }
                | end
            )


def _reads(data: ReportData) -> Iterator[dict[str, str]]:
    for _, contender, begin, end in _contenders(data):
        for step in contender.steps:
            if (reads := step.reads) is not None:
                yield (
                    begin
                    | {
                        "context × batch": f"{step.context} × {step.batch}",
                        "bytes a step": size(reads.read_bytes / reads.steps),
                        "dense 16 bit": size(reads.dense_bytes / reads.steps),
                        "read 1/": fixed(reads.ratio, 2),
                        "steps at anchors": f"{reads.anchor_share:.1%}",
                    }
                    | end
                )


def _capacities(data: ReportData) -> Iterator[dict[str, str]]:
    for result, contender, begin, end in _contenders(data):
        dense = {
            row.context: row.tokens for one in result.contenders if one.contender == result.baseline for row in one.capacity
        }
        for row in contender.capacity:
            own = contender.contender != result.baseline and row.context in dense
            yield (
                begin
                | {
                    "context": str(row.context),
                    "tokens": f"{row.tokens:,.0f}",
                    "requests": fixed(row.requests, 1),
                    "tokens / baseline": fixed(row.tokens / dense[row.context], 2) if own else "",
                }
                | end
            )


def _throughputs(data: ReportData) -> Iterator[dict[str, str]]:
    for _, contender, begin, end in _contenders(data):
        if (full := contender.throughput) is not None:
            yield (
                begin
                | {
                    "context": str(full.context),
                    "requests": str(full.requests),
                    "a step": duration(full.step_ms),
                    "tokens/s": fixed(full.tokens_per_s, 1),
                    "tokens/s / baseline": interval(full.of_baseline),
                }
                | end
            )


def _startups(data: ReportData) -> Iterator[dict[str, str]]:
    for _, contender, begin, end in _contenders(data):
        first = contender.first_token
        if contender.startup_s:
            yield (
                begin
                | {
                    "attention backend": _backend(contender),
                    "start-up, s, by round": ", ".join(fixed(seconds, 1) for seconds in contender.startup_s),
                    "CUDA graphs": size(contender.graph_bytes),
                    "peak": size(contender.peak_bytes),
                    "prompt": str(first.context) if first else "",
                    "first token, s": fixed(first.s, 3) if first else "",
                    "time / baseline": interval(first.of_baseline) if first else "",
                }
                | end
            )


def _backend(contender: ServingContender) -> str:
    names = ", ".join(name.rpartition(".")[2] for name in contender.backends)
    return f"{names} ({_FLASH} {contender.flash_attention})" if contender.flash_attention else names
