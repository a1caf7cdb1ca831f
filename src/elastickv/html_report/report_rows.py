"""A report as rows, and as JSON."""

from typing import Any

from elastickv.benchmark.result import Result
from elastickv.html_report.content import Content
from elastickv.html_report.report_data import IntervalEstimate, ModelRun, ReportData
from elastickv.results.kinds.original_result import OriginalResult
from elastickv.results.result_metrics import listed_metrics

COLUMNS = (
    "kind", "source", "date_utc", "device", "model", "context", "batch", "heads", "kv_heads", "head_dim", "cache", "asked",
    "recipe", "ratio_read", "ratio_stored", "baseline", "baseline_ms", "ms", "speedup", "speedup_low", "speedup_high", "faster",
    "cycle_speedup", "recipe_error", "recipe_error_p95", "held_bytes", "peak_bytes", "tokens_per_s", "ppl_change_percent", "kl",
    "top1_percent", "bits", "stored_bits", "pass_keys_found", "pass_keys_tried", "task", "items",
    "score_percent", "difference_points", "pairing", "warnings",
)  # fmt: skip


def rows_of(data: ReportData) -> list[dict[str, Any]]:
    """Return a row for each step, cache of a model, loss and pass-key cell, all with the columns of `COLUMNS`."""
    rows = [*_steps(data), *_models(data), *_evaluations(data), *_servings(data)]
    columns = [*COLUMNS, *(name for name, _ in listed_metrics())]
    return [dict.fromkeys(columns) | row for row in rows]


def as_dict(data: ReportData, content: Content) -> dict[str, Any]:
    """Return the report as JSON values."""
    headline = content.headline
    return {
        "title": content.title,
        "headline": {"source": headline.source, "sentence": headline.sentence, "beside": list(headline.beside)},
        "sections": [
            {
                "name": section.name,
                "title": section.title,
                "figures": [chart.name for chart in section.charts],
                "tables": [
                    {"caption": table.caption, "headers": list(table.headers), "rows": [list(row) for row in table.rows]}
                    for table in section.tables
                ],
                "notes": list(section.notes),
            }
            for section in content.sections
        ],
        "absent": [section.title for section in content.absent],
        "rows": rows_of(data),
        "notes": list(data.notes),
        "not_measured": dict(data.not_measured),
        "incomplete": list(data.incomplete),
        "unreadable": list(data.unreadable),
        "commands": {provenance.source: list(provenance.command) for provenance in data.provenance},
    }


def _common(provenance: Any, kind: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "source": provenance.source,
        "date_utc": provenance.date,
        "device": provenance.device,
        "warnings": "; ".join(provenance.warnings),
    }


def _speedup(ratio: IntervalEstimate | None) -> dict[str, Any]:
    if ratio is None:
        return {}
    return {"speedup": ratio.estimate, "speedup_low": ratio.low, "speedup_high": ratio.high}


def _steps(data: ReportData) -> list[dict[str, Any]]:
    return [
        _common(step.provenance, "step")
        | {name: getattr(step, name) for name in ("context", "batch", "heads", "kv_heads", "head_dim", "cache")}
        | {"asked": step.requested_label, "pairing": step.method.get("pairing")}
        | {"recipe": step.recipe, "ratio_read": step.read, "ratio_stored": step.stored}
        | {"baseline": step.baseline, "baseline_ms": step.dense_ms, "ms": step.elastic_ms, "faster": step.faster}
        | _speedup(step.speedup)
        | {"cycle_speedup": step.cycle and step.cycle.estimate}
        | {"recipe_error": step.error and step.error.mean, "recipe_error_p95": step.error and step.error.p95}
        | _listed(step.result)
        for step in data.steps
    ]


def _listed(result: Result | OriginalResult) -> dict[str, Any]:
    """Return the metrics that are in no other column."""
    return {name: metric.value(result) for name, metric in listed_metrics()} if isinstance(result, Result) else {}


def _models(data: ReportData) -> list[dict[str, Any]]:
    return [
        _common(model.provenance, "model")
        | {"model": model.model, "context": model.context, "batch": model.batch, "cache": cache.name, "asked": model.requested}
        | {"ratio_read": cache.read_ratio, "ratio_stored": cache.stored_ratio, "ms": cache.step_ms and cache.step_ms.estimate}
        | {"tokens_per_s": cache.tokens_per_s, "held_bytes": cache.held_bytes, "peak_bytes": cache.peak_bytes}
        | {"kl": cache.quality and cache.quality.kl_mean, "top1_percent": cache.quality and cache.quality.top1_percent}
        | _against(model, cache.name)
        for model in data.models
        for cache in model.caches
    ]


def _against(model: ModelRun, cache: str) -> dict[str, Any]:
    """Return a cache's speed-up against the baseline, where it has one."""
    ratio = next((ratio for ratio in model.ratios if ratio.fast == cache), None)
    return {} if ratio is None else {"baseline": ratio.slow} | _speedup(ratio.times)


def _evaluations(data: ReportData) -> list[dict[str, Any]]:
    rows = []
    for evaluation in data.evaluations:
        common = {"model": evaluation.model}
        for loss in evaluation.losses:
            row = _common(evaluation.provenance, "loss") | common | {"context": loss.context, "cache": loss.cache}
            row |= {"recipe": loss.recipe, "ratio_read": loss.read, "ratio_stored": loss.stored}
            row |= {"ppl_change_percent": loss.ppl_percent.estimate, "kl": loss.kl.estimate}
            rows.append(row | {"top1_percent": loss.top1_percent.estimate, "bits": loss.bits, "stored_bits": loss.stored_bits})
        for needle in evaluation.needles:
            row = _common(evaluation.provenance, "pass keys") | common | {"context": needle.tokens, "cache": needle.cache}
            rows.append(row | {"pass_keys_found": needle.hits, "pass_keys_tried": needle.tried})
        for task in evaluation.tasks:
            of_task = common | {"task": task.task, "context": task.tokens, "items": task.items}
            for score in task.caches:
                row = _common(evaluation.provenance, "task") | of_task | {"cache": score.cache}
                row |= {"ratio_read": score.read_ratio, "ratio_stored": score.stored_ratio}
                row |= {"score_percent": score.score_percent.mean, "difference_points": score.difference_points.mean}
                rows.append(row)
    return rows


def _servings(data: ReportData) -> list[dict[str, Any]]:
    return [
        _common(serving.provenance, "serving step")
        | {"model": serving.result.model, "context": step.context, "batch": step.batch, "cache": contender.contender}
        | {"ms": step.ms, "tokens_per_s": 1e3 * step.batch / step.ms, "peak_bytes": contender.peak_bytes}
        for serving in data.servings
        for contender in serving.result.contenders
        for step in contender.steps
    ]
