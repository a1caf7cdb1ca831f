"""Runs from the JSON of each program that writes results: one reader a kind, one line in `_READERS`."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

from elastickv.benchmark.result import SCHEMA_VERSION
from elastickv.benchmark.stats.intervals import SummaryStats, truncated
from elastickv.errors import UsageError
from elastickv.results.compare.runs import BenchmarkRun, Cell, OutputErrors, Pairs, Times
from elastickv.results.documents import Document
from elastickv.results.field_reader import Reader
from elastickv.results.model_readers import gguf_run, model_run, versions

T = TypeVar("T")
UNIT_SLACK = 2.0  # a file's mean and its samples differ by less unless their units do


def run_of(document: Document) -> BenchmarkRun | None:
    """Return what a document says as a run; None where it is no result.

    Raises
    ------
    UsageError : naming the file, if it is a result of another schema, lacks something or mixes units.
    """
    value = document.value
    if not isinstance(value, dict):
        return None
    for holds, read in _READERS:
        if holds(value):
            return guarded(document, lambda: read(Reader(document.source, value)))  # noqa: B023
    return None


def guarded(document: Document, read: Callable[[], T]) -> T:
    """Return what `read` makes of a document.

    Raises
    ------
    UsageError : naming the file, also where it holds a value of a kind that nobody thought of.
    """
    try:
        return read()
    except UsageError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise Reader(document.source, {}).refused(
            f"holds what is no part of a result ({' '.join(str(error).split())})"
        ) from None


def _shape(reader: Reader, kv_heads: int, batch: int) -> Pairs:
    return (
        ("seq", reader.count("configuration", "seq_len")),
        ("batch", batch),
        ("heads", reader.count("configuration", "heads")),
        ("kv_heads", kv_heads),
        ("dim", reader.count("configuration", "head_dim")),
    )


def _elastickv(reader: Reader) -> BenchmarkRun:
    at = reader.at
    written = str(at("schema_version"))
    if written.partition(".")[0] != SCHEMA_VERSION.partition(".")[0]:
        todo = "measure again" if _number(written) < _number(SCHEMA_VERSION) else "update elastickv, or measure again"
        raise UsageError(f"{reader.source} is of schema {written}, and this program reads {SCHEMA_VERSION}: {todo}")
    asked = (
        ("compress", reader.number("configuration", "compression")),
        ("recipe", reader.text("recipe", "requested")),
        ("dtype", reader.text("configuration", "dtype")),
        ("cache", reader.text("configuration", "cache")),
    )
    return BenchmarkRun(
        source=reader.source,
        cell=Cell(_shape(reader, reader.count("configuration", "kv_heads"), reader.count("configuration", "batch")), asked),
        device=_device(reader),
        recipe=reader.text("recipe", "text"),
        ratio_read=reader.number("recipe", "ratio_read"),
        protocol={
            "program": "elastickv",
            "driver": at("gpu", "driver"),
            "pairing": at("pairing"),
            "CUDA graphs": at("build", "cuda_graphs"),
            "inner loops": at("build", "inner_loops_requested"),
            "warm-up": reader.optional("configuration", "warmup"),
            "truncation": at("build", "truncate_percent"),
            "threads": reader.optional("environment", "threads"),
        }
        | versions(reader),
        figures=_step(reader) | _cycle(reader),
        fidelity=_fidelity(reader),
        complete=bool(at("complete")),
    )


def _step(reader: Reader) -> dict[str, Times]:
    truncate = reader.number("build", "truncate_percent")
    if truncate >= 50:
        raise reader.refused(f"has {truncate:g} in build.truncate_percent, of which nothing is left")
    elastic = reader.times(reader.at("samples", "elastic"), "samples.elastic")
    if len(elastic) < 2:
        raise reader.refused(f"has {len(elastic)} samples of the elastic step, and 2 make an interval")
    mean = reader.number("results", "attention_time_ms")
    held = float(truncated(elastic, truncate).mean())
    if not held / UNIT_SLACK < mean < held * UNIT_SLACK:
        raise UsageError(
            f"{reader.source} mixes units: results.attention_time_ms is {mean:g}, the mean of its samples {held:g}; both are "
            "milliseconds in what `elastickv bench` writes: measure again"
        )
    baseline = reader.text("baseline", "name")
    timings = [timing for timing in reader.at("contenders", kind=list) if isinstance(timing, dict)]
    names = {str(t.get("name")): t for t in timings if t.get("kind") in ("dense", "peer")}
    dense = {}
    for series, samples in reader.at("samples", kind=dict).items():
        name = baseline if series == "baseline" else series
        if name in names:
            # A peer of another version is another program: it is no control.
            version = f" {names[name].get('version')}" if names[name]["kind"] == "peer" else ""
            dense[name + version] = reader.times(samples, f"samples.{series}")
    return {"step": Times(mean, elastic, dense, truncate)}


def _cycle(reader: Reader) -> dict[str, Times]:
    if reader.optional("inference_cycle") is None:
        return {}
    totals = {}
    for name in ("dense", "elastic"):
        latencies = reader.at("inference_cycle", "raw_token_latencies_ms", name)
        totals[name] = reader.rounds(latencies, "token latencies")
    figure = f"cycle of {reader.at('inference_cycle', 'decode_tokens')}"
    enough = len(totals["elastic"]) > 1
    control = {reader.text("inference_cycle", "baseline_name"): totals["dense"]} if enough else {}
    layers = reader.count("inference_cycle", "layers")
    per_layer = tuple(total / layers for total in totals["elastic"])
    mean = reader.positive("inference_cycle", "elastic_total_ms")
    return {figure: Times(mean, per_layer if enough else None, control, 0.0)}


def _fidelity(reader: Reader) -> OutputErrors | None:
    if reader.optional("fidelity", "sample") is None:
        return None
    error = ("fidelity", "sample", "recipe_error")
    tokens = " to ".join(map(str, reader.at("fidelity", "sample", "context", kind=list)))
    return OutputErrors(
        f"{reader.at('fidelity', 'source')}, tokens {tokens}",
        reader.number(*error, "mean"),
        reader.number(*error, "p95"),
        reader.number(*error, "max"),
        reader.number("fidelity", "sample", "kernel_error", "mean"),
    )


def _original(reader: Reader) -> BenchmarkRun:
    at, reps = reader.at, reader.count("configuration", "reps")
    truncate = reader.number("build", "truncate_percent")
    # The original cuts at most a tenth at either end, and nothing of 20 samples or fewer.
    cut = min(truncate, 10.0) if reps > 20 else 0.0
    mean, std = reader.positive("results", "attention_time_ms"), reader.number("results", "attention_time_std")
    figures = {"step": Times(mean, SummaryStats(mean, std, reps, cut) if reps > 1 else None, {}, cut)}
    if reader.optional("inference_cycle") is not None:
        tokens = at("inference_cycle", "decode_tokens")
        figures[f"cycle of {tokens}"] = Times(reader.positive("inference_cycle", "elastic_total_ms"), None, {}, 0.0)
    asked = (
        ("compress", reader.number("configuration", "compression")),
        ("recipe", "original"),
        ("dtype", "fp32"),
        ("cache", "hot"),
    )
    return BenchmarkRun(
        source=reader.source,
        cell=Cell(_shape(reader, reader.count("configuration", "heads"), 1), asked),
        device=reader.text("gpu", "name"),
        recipe=None,
        ratio_read=None,
        protocol={
            "program": "the original",
            "CUDA graphs": at("build", "cuda_graphs"),
            "inner loops": at("build", "inner_loops"),
            "warm-up": at("configuration", "warmup"),
            "truncation": truncate,
        },
        figures=figures,
        fidelity=None,
        complete=True,
    )


def _device(reader: Reader) -> str:
    """Return the device's name; a processor's with the threads that it ran, for its name does not tell its size."""
    name = str(reader.at("gpu", "name"))
    return f"{name} ({reader.at('gpu', 'compute_units')} threads)" if reader.at("gpu", "kind") == "cpu" else name


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else 0 for part in version.split("."))


_READERS: tuple[tuple[Callable[[dict[str, Any]], bool], Callable[[Reader], BenchmarkRun]], ...] = (
    (lambda value: "benchmark_type" in value and ("schema_version" in value or value["benchmark_type"] == "elastic_kv_cache"),
     _elastickv),
    (lambda value: "benchmark_type" in value and "results" in value, _original),
    (lambda value: value.get("kind") == "elastickv-model-bench", model_run),
    (lambda value: value.get("kind") == "elastickv-gguf-baseline", gguf_run),
)  # fmt: skip

__all__ = ["Reader", "run_of"]
