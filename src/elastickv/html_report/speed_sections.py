"""The sections on speed."""

from collections.abc import Iterator

from elastickv.benchmark.result import Result
from elastickv.html_report.charts.detail_charts import latency_chart
from elastickv.html_report.charts.speed_charts import roofline_charts, speedup_charts
from elastickv.html_report.charts.time_charts import time_charts
from elastickv.html_report.charts.token_charts import token_chart
from elastickv.html_report.content import Section, tables
from elastickv.html_report.headline import best_model, best_step
from elastickv.html_report.report_data import ReportData, Step
from elastickv.results.formats.rows import brief
from elastickv.results.formats.units import duration, fixed, interval, quantiles
from elastickv.results.result_metrics import METRICS, listed_metrics

NOT_PAIRED = "dense and elastic not in turns"
BENCH = "a result of elastickv bench, or a sweep"


def speedup(data: ReportData) -> Section:
    """Return the speed-up against C."""
    return Section(
        "speedup",
        "Speed-up against C",
        "C is what a step saves: dense bytes / bytes read. On the dashed line C = ideal a recipe that reads 1/C of the bytes "
        "takes 1/C of the time. Dense is the fastest contender of the same run; bars are 95 % intervals.",
        charts=list(speedup_charts(data.steps)),
        missing=BENCH,
    )


def roofline(data: ReportData) -> Section:
    """Return the roofline of each device."""
    return Section(
        "roofline",
        "Roofline",
        "Left of the ridge memory bandwidth is the limit, right of it arithmetic. Both ceilings were measured on the device, "
        "in the same runs; their median is drawn. The way up to the line is what a better kernel could gain.",
        charts=list(roofline_charts(data.steps)),
        missing=BENCH,
    )


def time(data: ReportData) -> Section:
    """Return time per step against context."""
    charts, left = time_charts(data.steps)
    return Section(
        "time",
        "Time per step against context",
        "One decode step of one layer, on logarithmic axes, with 95 % intervals. Of each package of peers the fastest variant "
        "is drawn. Where several results measured the same in the same way, it is their median, and the bar reaches over all "
        "their intervals; what was measured in another way is a series of its own.",
        charts=charts,
        notes=[f"too much to be drawn, but in the table of all results: {'; '.join(left)}"] if left else (),
        missing=BENCH,
    )


def latency(data: ReportData) -> Section:
    """Return the distribution of raw samples."""
    charts = []
    step = best_step(data.steps)
    if step is not None and step.baseline is not None:
        series = {name: step.samples_ms.get(name, ()) for name in (step.baseline, "elastic")}
        if all(len(samples) > 1 for samples in series.values()):
            charts.append(latency_chart("latency-step", f"Decode step: {step.what}", series, "per decode step of one layer"))
    step = best_step([step for step in data.steps if step.token_ms and min(map(len, step.token_ms.values())) > 1])
    if step is not None:
        title = f"Token of the inference cycle: {step.what}"
        charts.append(latency_chart("latency-token", title, step.token_ms, "per token through all layers"))
        cycle = (
            step.result.inference_cycle.raw_token_latencies_ms
            if isinstance(step.result, Result) and step.result.inference_cycle
            else {}
        )
        if min((len(tokens) for rounds in cycle.values() for tokens in rounds), default=0) > 1:
            charts.append(token_chart("latency-by-token", f"Each token of the inference cycle: {step.what}", cycle))
    models = [model for model in data.models if any(len(cache.token_ms) > 1 for cache in model.caches)]
    if models:
        model = best_model(models)
        series = {cache.name: cache.token_ms for cache in model.caches if len(cache.token_ms) > 1}
        title = f"Token of {model.model}, {model.context} tokens × {model.batch}"
        charts.append(latency_chart("latency-model", title, series, "per decoded token, whole model"))
    return Section(
        "latency",
        "Latency distribution",
        "The share of raw samples that took no longer than a time; the marks are the median (p50) and the 99th percentile "
        "(p99). Steep is steady. Drawn are the results of the largest speed-up; the table has all; the peers' are in the "
        "download. A sample of a step is the mean of steps over whole anchor intervals; a token is one token, and there the "
        "anchors show.",
        charts=charts,
        tables=tables("Raw samples", _latencies(data), ("recipe or model", "shape", "of")),
        missing="results that hold raw samples",
    )


def _latencies(data: ReportData) -> Iterator[dict[str, str]]:
    for step in data.steps:
        tokens = {f"{name}, token": series for name, series in step.token_ms.items()}
        for name, series in {**step.samples_ms, **tokens}.items():
            if len(series) > 1 and name in (step.baseline, "elastic", *tokens):
                where = {"recipe or model": step.what, "context": str(step.context), "shape": step.shape, "of": name}
                yield where | {"samples": str(len(series))} | quantiles(series)
    for model in data.models:
        for cache in model.caches:
            if len(cache.token_ms) > 1:
                where = {"recipe or model": model.model, "context": str(model.context), "shape": f"batch {model.batch}"}
                yield where | {"of": cache.name, "samples": str(len(cache.token_ms))} | quantiles(cache.token_ms)


def results(data: ReportData) -> Section:
    """Return the table of all decode steps."""
    rows = (
        {
            "recipe": step.what + _fallback(step),
            "context": str(step.context),
            "shape": step.shape,
            METRICS["ratio_read"].label: fixed(step.read, 2),
            METRICS["ratio_stored"].label: fixed(step.stored, 2),
            METRICS["speedup"].label: interval(step.speedup, 3, "×") + _doubt(step),
            METRICS["cycle_speedup"].label: interval(step.cycle, 3, "×"),
            METRICS["recipe_error"].label: fixed(step.error.mean if step.error else None, 4),
            "p95": fixed(step.error.p95 if step.error else None, 4),
            "elastic": duration(step.elastic_ms),
            "dense": duration(step.dense_ms),
            METRICS["baseline"].label: step.baseline or "",
            "A/A": interval(step.noise_floor),
            "measured": NOT_PAIRED if step.method.get("pairing") == "sequential" else "",
            **_listed(step),
            "requested": step.requested_label,
            "result": data.names[step.provenance.source],
        }
        for step in sorted(
            data.steps, key=lambda step: (step.provenance.device, step.heads, step.batch, step.context, step.read or 0)
        )
    )
    return Section(
        "results",
        "All results",
        "Speed-up: dense time / elastic time, measured in turns. Cycle: the same of whole decoded tokens, appending and "
        "selecting included. Recipe error: relative L2 against dense attention. A/A: dense against itself, the noise.",
        tables=tables(
            "Decode steps of one layer, with 95 % intervals",
            rows,
            ("recipe", "shape", METRICS["baseline"].label, "measured", "requested", "result"),
        ),
        missing=BENCH,
    )


def _listed(step: Step) -> dict[str, str]:
    """Return the metrics that have no column of their own; empty for the original program."""
    result = step.result
    return {metric.header: brief(metric.value(result)) if isinstance(result, Result) else "" for _, metric in listed_metrics()}


def _fallback(step: Step) -> str:
    return " (fallback)" if isinstance(step.result, Result) and step.result.fallback else ""


def _doubt(step: Step) -> str:
    return " (within noise)" if step.faster is False and step.speedup and step.speedup.estimate >= 1 else ""
