"""What `elastickv baseline` measured, as text."""

from collections.abc import Callable
from typing import Any

from elastickv.results.formats import generation_table as generation
from elastickv.results.formats.generation_table import columns, generation_table, with_bounds
from elastickv.results.formats.html import html_paragraphs, html_table
from elastickv.results.formats.plain_json import dumps
from elastickv.results.formats.rows import as_jsonl, brief, csv_of, markdown_of

_MIB = 1 << 20


def baseline_table(result: dict[str, Any]) -> str:
    """Return a column for each cache, the ratios of their speeds, and what they cost."""
    if "formats" in result:
        return _gguf(result)
    return generation_table(result) + _price_line("elastic", result["fidelity"], result["fidelity_not_measured"])


def gguf_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the main figures of llama.cpp, a row for each type of KV cache; None where there is none."""
    speedups = {name: ratio or {} for name, ratio in result["speedups"].items()}
    asked = {"model": result["model"]["name"], "device": result["engine"]["device"], "context": result["context"]}
    return [
        asked
        | {name: cache[name] for name in ("cache", "prompt_tokens_per_s", "tokens_per_s")}
        | {f"step_ms_{bound}": cache["step_ms"][bound] for bound in ("low", "high")}
        | {name: cache[name] for name in ("kv_bytes_per_token", "stored_ratio")}
        | {name: (cache["fidelity"] or {}).get(name) for name in ("kl_mean", "kl_max", "perplexity", "top1_percent")}
        | {f"speedup_{bound}": speedups.get(cache["cache"], {}).get(bound) for bound in ("estimate", "low", "high")}
        for cache in result["caches"]
    ]


def _as_html(result: dict[str, Any]) -> str:
    heading, *said = baseline_table(result).splitlines()
    told = [line for line in said if ": " in line]
    rows = gguf_rows(result)
    cells = [list(map(brief, row.values())) for row in rows]
    return html_paragraphs([heading]) + html_table(list(rows[0]), cells, told)


TRANSFORMERS_FORMATS: dict[str, Callable[[dict[str, Any]], str]] = generation.FORMATS | {"table": baseline_table}
GGUF_FORMATS: dict[str, Callable[[dict[str, Any]], str]] = {
    "table": baseline_table,
    "json": dumps,
    "jsonl": as_jsonl,
    "csv": lambda result: csv_of(gguf_rows(result)),
    "md": lambda result: markdown_of(gguf_rows(result)),
    "html": _as_html,
}


def _gguf(result: dict[str, Any]) -> str:
    model, caches, engine = result["model"], result["caches"], result["engine"]
    lines = [
        f"{model['name']}, {model['file_bytes'] / _MIB:.1f} MiB, {engine['name']} {engine['version']} on {engine['device']}, "
        f"{result['threads']} threads, prompt of {result['context']} tokens, "
        f"{result['rounds']} samples of {result['tokens']} decodes"
    ]
    rows: list[list[str]] = [
        ["", *(cache["cache"] for cache in caches)],
        ["tokens/s, prompt", *(f"{cache['prompt_tokens_per_s']:.1f}" for cache in caches)],
        ["  interval", *(_rate(cache["prompt_ms"]) for cache in caches)],
        ["tokens/s, decode", *(f"{cache['tokens_per_s']:.2f}" for cache in caches)],
        ["  interval", *(_rate(cache["step_ms"]) for cache in caches)],
        ["KV bytes a token", *(_figure(cache["kv_bytes_per_token"], "{:.0f}") for cache in caches)],
        ["  1/x of 16 bit", *(_figure(cache["stored_ratio"], "{:.2f}") for cache in caches)],
    ]
    if result["fidelity_not_measured"] is None:
        prices = [cache["fidelity"] for cache in caches]
        rows += [
            [f"KL to {result['baseline']}, nats", *(f"{price['kl_mean']:.5f}" for price in prices)],
            ["  largest", *(f"{price['kl_max']:.5f}" for price in prices)],
            ["perplexity", *(f"{price['perplexity']:.3f}" for price in prices)],
            ["same likeliest token", *(f"{price['top1_percent']:.0f} %" for price in prices)],
        ]
    lines += columns(rows)
    if result["formats"]:
        lines.append("")
        lines += columns(
            [
                ["our formats", *(own["recipe"] for own in result["formats"])],
                ["KV bytes a cold token", *(f"{own['kv_bytes_per_cold_token']:.0f}" for own in result["formats"])],
                [
                    f"KV bytes a token of {result['context']}",
                    *(f"{own['kv_bytes_per_token']:.0f}" for own in result["formats"]),
                ],
                ["  1/x of 16 bit", *(f"{own['stored_ratio']:.2f}" for own in result["formats"])],
            ]
        )
        lines.append("")
    else:
        lines.append(f"our formats' bytes: not counted: {result['formats_not_counted']}")
    if result["bytes_not_counted"]:
        lines.append(f"KV bytes: not counted: {result['bytes_not_counted']}")
    for name, ratio in result["speedups"].items():
        lines.append(f"decode, {name} / {result['baseline']}: {with_bounds(ratio)} times as fast, {ratio['samples']} pairs")
    if result["noise_floor"]:
        lines.append(f"noise floor: {with_bounds(result['noise_floor'])}")
    if result["fidelity_not_measured"] is None:
        price = caches[0]["fidelity"]
        lines.append(f"predictions: {price['tokens']} tokens of {price['text']} after {price['context']}")
    else:
        lines.append(f"predictions: not measured: {result['fidelity_not_measured']}")
    return "\n".join(lines) + "\n"


def _price_line(cache: str, price: dict[str, Any] | None, reason: str | None) -> str:
    if price is None:
        return f"predictions: not measured: {reason}\n"
    return (
        f"predictions, {price['tokens']} tokens of {price['text']} after {price['context']}: {cache} against "
        f"{price['reference']}: KL mean {price['kl_mean']:.5f}, largest {price['kl_max']:.5f} nats; perplexity "
        f"{price['perplexity']:.3f} (was {price['reference_perplexity']:.3f}); "
        f"same likeliest token {price['top1_percent']:.0f} %\n"
    )


def _rate(ms: dict[str, float]) -> str:
    """Return an interval of a token's milliseconds as tokens per second."""
    return f"{1e3 / ms['high']:.4g}..{1e3 / ms['low']:.4g}"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
