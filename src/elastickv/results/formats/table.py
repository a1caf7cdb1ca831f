"""A result on a terminal, and in a notebook."""

import io

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from elastickv.benchmark.result import RecipeUsed, Result
from elastickv.errors import printable
from elastickv.results.formats.html import html_paragraphs, html_table
from elastickv.results.formats.rows import brief
from elastickv.results.formats.units import with_bounds
from elastickv.results.result_metrics import listed_metrics

_HEADERS = ("decode step", "ms", "CV %", "KV GB/s")


def literal(text: str) -> str:
    """Escape a text so that rich prints it literally: no markup, no terminal control sequences."""
    return escape(printable(text, keep=""))


def as_table(result: Result) -> str:
    """Return the device and workload, the contenders' times, the speed-up with the recipe error, and every warning."""
    out = io.StringIO()
    console = Console(file=out, width=100, highlight=False, force_jupyter=False, force_terminal=False)
    name, workload = _workload(result)
    console.print(f"[bold]{literal(name)}[/]  {literal(workload)}")
    console.print(f"recipe [bold]{literal(result.recipe.text)}[/] {literal(_bytes(result.recipe))}{_fallback(result)}")
    table = Table(box=None, pad_edge=False)
    for header in _HEADERS:
        table.add_column(header, justify="left" if header == _HEADERS[0] else "right")
    for cells in _contenders(result):
        table.add_row(*map(literal, cells))
    console.print(table)
    for line in _sentences(result):
        console.print(literal(line), soft_wrap=True)
    for warning in result.warnings:
        console.print(f"[yellow]warning:[/] {literal(warning)}", soft_wrap=True)
    return out.getvalue()


def as_html(result: Result) -> str:
    """Return the same for a notebook."""
    heading = ["  ".join(_workload(result)), f"recipe {result.recipe.text} {_bytes(result.recipe)}{_fallback(result)}"]
    notes = [*_sentences(result), *(f"warning: {warning}" for warning in result.warnings)]
    return html_paragraphs(heading) + html_table(_HEADERS, _contenders(result), notes)


def _workload(result: Result) -> tuple[str, str]:
    """Return the device's name and what it decoded."""
    configuration = result.configuration
    return result.gpu.name, (
        f"context {configuration.seq_len}, batch {configuration.batch}, "
        f"{configuration.heads} query / {configuration.kv_heads} KV heads x {configuration.head_dim}, "
        f"compress={configuration.compression:g}, {configuration.cache} cache"
    )


def _bytes(recipe: RecipeUsed) -> str:
    return (
        f"({recipe.hash}): reads 1/{recipe.ratio_read:.2f}, "
        f"stores 1/{recipe.ratio_stored:.2f} of dense 16-bit bytes{_expected(recipe)}"
    )


def _fallback(result: Result) -> str:
    """Return what a fallback means for the budget; nothing where the recipe was timed."""
    return f"; FALLBACK, budget 1/{result.configuration.compression:g} not met" if result.fallback else ""


def _contenders(result: Result) -> list[tuple[str, ...]]:
    return [
        (
            timing.name + (" (baseline)" if timing.name == result.baseline.name else ""),
            f"{timing.time_ms:.4f}",
            f"{100 * timing.coefficient_of_variation:.2f}",
            f"{timing.kv_bandwidth_gbs:.1f}",
        )
        for timing in result.contenders
    ]


def _expected(recipe: RecipeUsed) -> str:
    """Return what the solver expects of a recipe; older files do not say."""
    loss, most = recipe.predicted_loss, recipe.largest_ratio_scoring_every_step
    text = f"; expected loss {loss:.3f}" if loss is not None else ""
    return text + (f"; scoring every step would allow up to 1/{most:.1f}" if most is not None else "")


def _sentences(result: Result) -> list[str]:
    speedup, floor, roofline = result.speedup, result.noise_floor, result.roofline
    dense, elastic = roofline["dense"], roofline["elastic"]
    verdict = "" if result.faster else "; not beyond the noise floor"
    noise = f"A/A {with_bounds(floor)}" if floor else "A/A not measured"
    lines = [
        f"speed-up {with_bounds(speedup, unit='x')}{' at 95 %' if speedup.is_shown else ''}; {noise}{verdict}",
        f"bandwidth: dense {dense.bandwidth_gbs:.1f}, elastic {elastic.bandwidth_gbs:.1f}, "
        f"read ceiling {result.ceilings['read_gbs']:.1f} GB/s; roofline score: dense {dense.score:.2f}, "
        f"elastic {elastic.score:.2f}",
    ]
    if result.baseline.reason:
        lines.insert(0, f"baseline {result.baseline.name}: {result.baseline.reason}")
    sample = result.fidelity.sample
    if sample:
        error, kernel = sample.recipe_error, sample.kernel_error
        differs = f"; {result.fidelity.sample_differs}" if result.fidelity.sample_differs else ""
        lines.append(
            f"recipe error on {result.fidelity.source} ({sample.recipe}, context {sample.context[1]}{differs}): "
            f"mean {error.mean:.4f}, p95 {error.p95:.4f}, max {error.max:.4f}; kernel error {kernel.mean:.1e}"
        )
    cycle = result.inference_cycle
    if cycle:
        latency = cycle.elastic_token_latency_ms
        lines.append(
            f"inference cycle, {cycle.decode_tokens} tokens, {cycle.layers} layers, per layer: dense "
            f"{cycle.baseline_total_ms:.3f} ms, elastic {cycle.elastic_total_ms:.3f} ms, "
            f"{cycle.speedup_vs_baseline:.3f}x; token latency p99/p50 {latency['p99'] / latency['p50']:.2f}"
        )
    lines += [f"{metric.header}: {brief(metric.value(result)) or '-'}" for _, metric in listed_metrics()]
    if result.verdict:
        parts = ", ".join(f"{judgement.criterion} {judgement.outcome}" for judgement in result.verdict.criteria)
        lines.append(f"gate {result.verdict.gate}: {result.verdict.outcome.upper()} ({parts})")
    return lines
