"""What `elastickv baseline` measured, as text."""

from collections.abc import Callable
from typing import Any

from elastickv.benchmark.stats.intervals import Interval
from elastickv.errors import printable
from elastickv.results.formats import generation_table as generation
from elastickv.results.formats.generation_table import bounds_of, columns, generation_table, prompt_lines
from elastickv.results.formats.html import html_paragraphs, html_table
from elastickv.results.formats.rows import as_json, as_jsonl, brief, csv_of, markdown_of
from elastickv.results.formats.units import NO_INTERVAL, ratio_sentence, with_bounds
from elastickv.results.kinds.gguf_result import GgufBaseline
from elastickv.results.kinds.model_result import TransformersBaseline
from elastickv.results.speed_ratios import gguf_ratios

_MIB = 1 << 20
_PREDICTION_COLUMNS = ("kl_mean", "kl_max", "perplexity", "top1_percent")


def transformers_table(result: TransformersBaseline) -> str:
    """Return a column for each cache, the ratios of their speeds, and the quality cost of the elastic one."""
    return generation_table(result) + printable(_predictions(result), keep="") + "\n"


def gguf_rows(result: GgufBaseline) -> list[dict[str, Any]]:
    """Return the main figures of llama.cpp, a row for each type of KV cache; None where there is none."""
    ratios = gguf_ratios(result)
    common = {"model": result.model.name, "device": result.engine["device"], "context": result.context}
    return [
        common
        | {name: getattr(cache, name) for name in ("cache", "prompt_tokens_per_s", "tokens_per_s")}
        | dict(zip(("step_ms_low", "step_ms_high"), bounds_of(cache.step_ms), strict=True))
        | {name: getattr(cache, name) for name in ("kv_bytes_per_token", "stored_ratio")}
        | {name: getattr(cache.fidelity, name, None) for name in _PREDICTION_COLUMNS}
        | {f"speedup_{bound}": getattr(ratios.get(cache.cache), bound, None) for bound in ("estimate", "low", "high")}
        for cache in result.caches
    ]


def _as_html(result: GgufBaseline) -> str:
    heading, *lines = gguf_table(result).splitlines()
    rows = gguf_rows(result)
    cells = [list(map(brief, row.values())) for row in rows]
    headers, notes = list(rows[0]) if rows else [], [line for line in lines if ": " in line]
    return html_paragraphs([heading]) + html_table(headers, cells, notes)


def gguf_table(result: GgufBaseline) -> str:
    """Return a column for each KV cache type of llama.cpp, our formats' bytes, and the ratios of their speeds."""
    model, caches, engine = result.model, result.caches, result.engine
    lines = [
        f"{model.name}, {model.file_bytes / _MIB:.1f} MiB, {engine['name']} {engine['version']} on {engine['device']}, "
        f"{result.threads} threads, prompt of {result.context} tokens, "
        f"{result.rounds} samples of {result.tokens} decodes"
    ]
    rows: list[list[str]] = [
        ["", *(cache.cache for cache in caches)],
        ["tokens/s, prompt", *(f"{cache.prompt_tokens_per_s:.1f}" for cache in caches)],
        ["  interval", *(_rate(cache.prompt_ms) for cache in caches)],
        ["tokens/s, decode", *(f"{cache.tokens_per_s:.2f}" for cache in caches)],
        ["  interval", *(_rate(cache.step_ms) for cache in caches)],
        ["KV bytes a token", *(_figure(cache.kv_bytes_per_token, "{:.0f}") for cache in caches)],
        ["  1/x of 16 bit", *(_figure(cache.stored_ratio, "{:.2f}") for cache in caches)],
    ]
    if result.fidelity_not_measured is None:

        def figures(name: str, form: str) -> list[str]:
            return [_figure(getattr(cache.fidelity, name, None), form) for cache in caches]

        rows += [
            [f"KL to {result.baseline}, nats", *figures("kl_mean", "{:.5f}")],
            ["  largest", *figures("kl_max", "{:.5f}")],
            ["perplexity", *figures("perplexity", "{:.3f}")],
            ["same likeliest token", *figures("top1_percent", "{:.0f} %")],
        ]
    lines += [*columns(rows), *_our_formats(result)]
    if result.bytes_not_counted:
        lines.append(f"KV bytes: not counted: {result.bytes_not_counted}")
    lines += [f"decode, {ratio_sentence(ratio)}" for ratio in gguf_ratios(result).values()]
    if any(ms is None or not ms.is_shown for cache in caches for ms in (cache.prompt_ms, cache.step_ms)):
        lines.append(f"tokens/s: {NO_INTERVAL}")
    if result.noise_floor:
        lines.append(f"noise floor: {with_bounds(result.noise_floor)}")
    lines += prompt_lines(result.prompt)
    delta = caches[0].fidelity if caches else None
    if delta is not None:
        lines.append(f"predictions: {delta.tokens} tokens of {delta.text} after {delta.context}")
    else:
        lines.append(f"predictions: not measured: {result.fidelity_not_measured}")
    return "".join(printable(line, keep="") + "\n" for line in lines)


def _our_formats(result: GgufBaseline) -> list[str]:
    formats = result.formats
    if not formats:
        return [f"our formats' bytes: not counted: {result.formats_not_counted}"]
    rows = [
        ["our formats", *(own.recipe for own in formats)],
        ["KV bytes a cold token", *(f"{own.kv_bytes_per_cold_token:.0f}" for own in formats)],
        [f"KV bytes a token of {result.context}", *(f"{own.kv_bytes_per_token:.0f}" for own in formats)],
        ["  1/x of 16 bit", *(f"{own.stored_ratio:.2f}" for own in formats)],
    ]
    return ["", *columns(rows), ""]


def _predictions(result: TransformersBaseline) -> str:
    delta = result.fidelity
    if delta is None:
        return f"predictions: not measured: {result.fidelity_not_measured}"
    return (
        f"predictions, {delta.tokens} tokens of {delta.text} after {delta.context}: elastic against "
        f"{delta.reference}: KL mean {delta.kl_mean:.5f}, largest {delta.kl_max:.5f} nats; perplexity "
        f"{delta.perplexity:.3f} (was {delta.reference_perplexity:.3f}); "
        f"same likeliest token {delta.top1_percent:.0f} %"
    )


def _rate(ms: Interval | None) -> str:
    """Return an interval of a token's milliseconds as tokens per second; a word where too few samples make none."""
    if ms is None or not ms.is_shown:
        return "none"
    return f"{1e3 / ms.high:.4g}..{1e3 / ms.low:.4g}"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


TRANSFORMERS_FORMATS: dict[str, Callable[[Any], str]] = generation.FORMATS | {"table": transformers_table}
GGUF_FORMATS: dict[str, Callable[[Any], str]] = {
    "table": gguf_table,
    "json": as_json,
    "jsonl": as_jsonl,
    "csv": lambda result: csv_of(gguf_rows(result)),
    "md": lambda result: markdown_of(gguf_rows(result)),
    "html": _as_html,
}
