"""What a comparison takes of each kind of result."""

from dataclasses import replace
from typing import Any

from elastickv.benchmark.from_dict import refused
from elastickv.benchmark.result import Result
from elastickv.benchmark.stats.intervals import SummaryStats, truncated
from elastickv.errors import UsageError
from elastickv.results.compare.runs import BenchmarkRun, Cell, OutputErrors, Pairs, Times
from elastickv.results.kinds.gguf_result import GgufBaseline
from elastickv.results.kinds.model_result import (
    ELASTIC,
    CacheRecord,
    ModelBenchResult,
    QualityDelta,
    RunResult,
    TransformersBaseline,
    versions,
)
from elastickv.results.kinds.original_result import OriginalResult

UNIT_SLACK = 2.0  # a file's mean and its samples differ by less unless their units do


def bench_run(result: Result, source: str) -> BenchmarkRun:
    """Return a result of `bench` as a run.

    Raises
    ------
    UsageError : if it has too few samples, or its mean is in another unit than they are.
    """
    configuration, build = result.configuration, result.build
    workload = _shape(configuration, configuration.kv_heads, configuration.batch)
    requested = (
        ("compress", float(configuration.compression)),
        ("recipe", result.recipe.requested),
        ("dtype", configuration.dtype),
        ("cache", configuration.cache),
    )
    return BenchmarkRun(
        source=source,
        result=result,
        cell=Cell(workload, requested),
        device=_device(result),
        recipe=result.recipe.text,
        ratio_read=result.recipe.ratio_read,
        protocol={
            "program": "elastickv",
            "driver": result.gpu.driver,
            "pairing": result.pairing,
            "CUDA graphs": build.cuda_graphs,
            "inner loops": build.inner_loops_requested,
            "warm-up": configuration.warmup,
            "truncation": build.truncate_percent,
            "threads": result.environment.get("threads"),
        }
        | _other_versions(result.environment),
        figures={"step": _step(result, source)} | _cycle(result),
        fidelity=_recipe_errors(result),
        complete=result.complete,
    )


def original_run(result: OriginalResult, source: str) -> BenchmarkRun:
    """Return a result of the original program as a run: its mean and deviation stand for samples."""
    configuration, figures = result.configuration, result.results
    # The original cuts at most a tenth at either end, and nothing of 20 samples or fewer.
    cut = min(result.build.truncate_percent, 10.0) if configuration.reps > 20 else 0.0
    mean = figures.attention_time_ms
    spread = SummaryStats(mean, figures.attention_time_std, configuration.reps, cut) if configuration.reps > 1 else None
    times = {"step": Times(mean, spread, {}, cut)}
    if result.inference_cycle is not None:
        cycle = result.inference_cycle
        times[f"cycle of {cycle.decode_tokens}"] = Times(cycle.elastic_total_ms, None, {}, 0.0)
    requested = (("compress", float(configuration.compression)), ("recipe", "original"), ("dtype", "fp32"), ("cache", "hot"))
    return BenchmarkRun(
        source=source,
        result=result,
        cell=Cell(_shape(configuration, configuration.heads, 1), requested),
        device=result.gpu.name,
        recipe=None,
        ratio_read=None,
        protocol={
            "program": "the original",
            "CUDA graphs": result.build.cuda_graphs,
            "inner loops": result.build.inner_loops,
            "warm-up": configuration.warmup,
            "truncation": float(result.build.truncate_percent),
        },
        figures=times,
        fidelity=None,
        complete=True,
    )


def model_run(result: ModelBenchResult, source: str) -> BenchmarkRun:
    """Return a model's speed with an elastic cache as a run, with its quality cost where it was measured.

    Raises
    ------
    UsageError : if it has no two rounds of the elastic cache.
    """
    caches = {cache.cache: cache for cache in result.caches}
    if ELASTIC not in caches:
        raise refused(source, "lacks the elastic cache")
    token_ms = {name: tuple(1e3 * sum(steps) / result.tokens for steps in cache.step_s or ()) for name, cache in caches.items()}
    elastic, cache = token_ms.pop(ELASTIC), caches[ELASTIC]
    if len(elastic) < 2:
        raise refused(source, "has no two rounds of the elastic cache")
    if not all(time > 0 for times in (elastic, *token_ms.values()) for time in times):
        raise refused(source, "has rounds of no steps in caches.step_s")
    requested = _requested(result, result.calibrated)
    return BenchmarkRun(
        source=source,
        result=result,
        cell=Cell((("model", result.model.name), ("context", result.context), ("batch", result.batch)), requested),
        device=result.device,
        recipe=str(cache.recipe_hash),
        ratio_read=cache.read_ratio,
        protocol={
            "program": "elastickv bench --model",
            "pairing": result.pairing,
            "tokens of a sample": result.tokens,
            "threads": result.environment.get("torch_threads"),
        }
        | _other_versions(result.environment),
        figures={"token": _with_rates(Times(sum(elastic) / len(elastic), elastic, token_ms, 0.0), cache)},
        fidelity=_quality_errors(result.fidelity if isinstance(result, TransformersBaseline) else None, ELASTIC),
        complete=True,
    )


def _requested(result: ModelBenchResult | RunResult, calibrated: bool | None) -> tuple[tuple[str, Any], ...]:
    """Return what was requested of a model's decode."""
    return (
        ("compress", str(result.compress)),
        ("recipe", str(result.recipe)),
        ("calibrated", calibrated),
        ("dtype", result.model.dtype),
    )


def generation_run(result: RunResult, source: str) -> BenchmarkRun:
    """Return what `elastickv run` generated as a run: one time a token, without samples, of each cache.

    Raises
    ------
    UsageError : if no token was timed with the elastic cache.
    """
    caches = {cache.cache: cache for cache in result.caches}
    if ELASTIC not in caches:
        raise refused(source, "lacks the elastic cache")
    cache = caches[ELASTIC]
    figures = {}
    for name in sorted(caches, key=lambda name: name != ELASTIC):
        label = "" if name == ELASTIC else f", {name}"
        if (rate := caches[name].tokens_per_s) is not None:
            figures[f"token{label}"] = _with_rates(Times(1e3 * caches[name].rows / rate, None, {}, 0.0), caches[name])
        if (first_s := caches[name].first_token_s) is not None:
            figures[f"first token{label}"] = Times(1e3 * first_s, None, {}, 0.0)
    if not figures:
        raise refused(source, "has no time of a token")
    requested = _requested(result, bool(cache.calibrated))
    return BenchmarkRun(
        source=source,
        result=result,
        cell=Cell((("model", result.model.name), ("prompt tokens", cache.prompt_tokens), ("batch", cache.rows)), requested),
        device=result.device,
        recipe=None if cache.recipe_hash is None else str(cache.recipe_hash),
        ratio_read=cache.read_ratio,
        protocol={
            "program": "elastickv run",
            "pairing": result.pairing or "elastic alone",
            "new tokens": cache.new_tokens,
            "temperature": result.temperature,
            "threads": result.environment.get("torch_threads"),
        }
        | _other_versions(result.environment),
        figures=figures,
        fidelity=None,
        complete=True,
    )


def gguf_run(result: GgufBaseline, source: str) -> BenchmarkRun:
    """Return llama.cpp's speed with each KV cache type; the first is the control of the others.

    Raises
    ------
    UsageError : if the first type is missing or a type has fewer than two samples.
    """
    names = [cache.cache for cache in result.caches]
    reference = result.baseline
    if reference not in names or len(set(names)) < len(names):
        raise refused(source, f"has the caches {', '.join(names) or 'none'}, of which {reference} should be one")
    deltas = {cache.cache: _quality_errors(cache.fidelity, cache.cache) for cache in result.caches}
    series = {
        "token": {cache.cache: (cache.decode_s, result.tokens) for cache in result.caches},
        "prompt token": {cache.cache: (cache.prompt_s, result.context) for cache in result.caches},
    }
    figures = {}
    for figure, by_cache in series.items():
        token_ms = {name: tuple(1e3 * s / count for s in samples) for name, (samples, count) in by_cache.items()}
        for name, samples in token_ms.items():
            if len(samples) < 2:
                raise refused(source, f"has no two samples of {name}")
            control = {} if name == reference else {reference: token_ms[reference]}
            mean = sum(samples) / len(samples)
            figures[f"{figure}, {name}"] = Times(mean, samples, control, 0.0, deltas[name], 1e3 / mean)
    workload = (("model", result.model.name), ("context", result.context), ("batch", 1))
    return BenchmarkRun(
        source=source,
        result=result,
        cell=Cell(workload, (("kv types", ",".join(names)),)),
        device=result.engine["device"],
        recipe=None,
        ratio_read=None,
        protocol={
            "program": "elastickv baseline gguf",
            "pairing": result.pairing,
            "tokens of a sample": result.tokens,
            "threads": result.threads,
            "llama.cpp": f"{result.engine['name']} {result.engine['version']}",
        }
        | _other_versions(result.environment),
        figures=figures,
        fidelity=max(filter(None, deltas.values()), key=lambda errors: errors.mean, default=None),
        complete=True,
    )


def kv_read_bytes_per_step(cache: CacheRecord) -> float | None:
    """Return the bytes of the KV cache that one step of a model reads; None where there was no step."""
    decodes = cache.new_tokens - 1  # the first token decodes nothing
    if cache.kv_read_bytes_per_step is None and decodes > 0:
        return cache.kv_read_bytes / decodes
    return cache.kv_read_bytes_per_step


def _with_rates(times: Times, cache: CacheRecord) -> Times:
    """Return the times of a model's decode with tokens per second and the KV cache's bytes."""
    read = kv_read_bytes_per_step(cache)
    kv_bytes = {"stored": cache.kv_stored_bytes} | ({} if read is None else {"read": read})
    return replace(times, tokens_per_s=cache.tokens_per_s, kv_bytes=kv_bytes)


def _shape(configuration: Any, kv_heads: int, batch: int) -> Pairs:
    return (
        ("seq", configuration.seq_len),
        ("batch", batch),
        ("heads", configuration.heads),
        ("kv_heads", kv_heads),
        ("dim", configuration.head_dim),
    )


def _step(result: Result, source: str) -> Times:
    truncate, elastic = float(result.build.truncate_percent), tuple(result.samples["elastic"])
    if truncate >= 50:
        raise refused(source, f"has {truncate:g} in build.truncate_percent, of which nothing is left")
    if len(elastic) < 2:
        raise refused(source, f"has {len(elastic)} samples of the elastic step, and 2 make an interval")
    mean = result.results.attention_time_ms
    sample_mean = float(truncated(elastic, truncate).mean())
    if not sample_mean / UNIT_SLACK < mean < sample_mean * UNIT_SLACK:
        raise UsageError(
            f"{source} mixes units: results.attention_time_ms is {mean:g}, the mean of its samples {sample_mean:g}; both are "
            "milliseconds in what `elastickv bench` writes: measure again"
        )
    timings = {timing.name: timing for timing in result.contenders if timing.kind in ("dense", "peer")}
    dense = {}
    for series, samples in result.samples.items():
        name = result.baseline.name if series == "baseline" else series
        if name in timings:
            # A peer of another version is another program: it is no control.
            version = f" {timings[name].version}" if timings[name].kind == "peer" else ""
            dense[name + version] = tuple(samples)
    return Times(mean, elastic, dense, truncate)


def _cycle(result: Result) -> dict[str, Times]:
    cycle = result.inference_cycle
    if cycle is None:
        return {}
    dense, elastic = (tuple(map(sum, cycle.raw_token_latencies_ms[name])) for name in ("dense", "elastic"))
    enough = len(elastic) > 1 and all(time > 0 for time in (*dense, *elastic))
    per_layer = tuple(total / cycle.layers for total in elastic)
    control = {cycle.baseline_name: dense} if enough else {}
    return {f"cycle of {cycle.decode_tokens}": Times(cycle.elastic_total_ms, per_layer if enough else None, control, 0.0)}


def _recipe_errors(result: Result) -> OutputErrors | None:
    sample = result.fidelity.sample
    if sample is None:
        return None
    error, tokens = sample.recipe_error, " to ".join(map(str, sample.context))
    return OutputErrors(
        f"{result.fidelity.source}, tokens {tokens}", error.mean, error.p95, error.max, sample.kernel_error.mean
    )


def _quality_errors(delta: QualityDelta | None, cache: str) -> OutputErrors | None:
    """Return what a model's predictions lose with a cache; None where that was not measured."""
    if delta is None:
        return None
    on = f"KL of {cache} to {delta.reference}, {delta.tokens} tokens of {delta.text} after {delta.context}"
    return OutputErrors(on, delta.kl_mean, delta.kl_p95, delta.kl_max, None)


def _device(result: Result) -> str:
    """Return the device's name; for a processor with the number of threads."""
    gpu = result.gpu
    return f"{gpu.name} ({gpu.compute_units} threads)" if gpu.kind == "cpu" else gpu.name


def _other_versions(environment: dict[str, Any]) -> dict[str, Any]:
    """Return the versions of what the times depend on, without this package's: its changes are what a comparison shows."""
    return {name: version for name, version in versions(environment).items() if name != "elastickv"}
