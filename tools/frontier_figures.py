"""What the documents show of methods at equal bytes (docs/fidelity.md), and of few bits (docs/recipes.md)."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from picture_files import picture_name

from elastickv.evaluation.evaluation_options import PARTS_METHOD, REFERENCE
from elastickv.evaluation.metrics import Estimate
from elastickv.html_report.charts.frontier_charts import frontier_charts
from elastickv.html_report.charts.style import Chart
from elastickv.html_report.comparisons.equal_bytes import sentences
from elastickv.html_report.comparisons.method_losses import (
    ComparedMethods,
    MethodLoss,
    compared_methods,
    front,
    read_bits,
    stored_bits,
)
from elastickv.html_report.model_results import evaluation_view
from elastickv.html_report.report_data import IntervalEstimate
from elastickv.results.kinds.evaluation_result import EvaluationResult, LossRow
from elastickv.results.kinds.model_result import versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FORMATS_ALONE, SELECTION_ALONE = " formats alone", " selection alone"
BUDGET = "stored_bits="


Results = dict[tuple[str, int, str], tuple[Path, EvaluationResult]]


def measured(pattern: str) -> Results:
    """Return the results by model, context and the exact tokens of all formats; those of a GPU stand for those of a CPU."""
    results: Results = {}
    for path in sorted(RESULTS.glob(pattern), key=lambda path: path.parent.name != "cpu"):
        result = EvaluationResult.from_dict(json.loads(path.read_text(encoding="utf-8")), path.name)
        for context in {row.context for row in result.rows}:
            results[result.model.name, context, result.exact_tokens] = (path, result)
    return dict(sorted(results.items()))


def frontier() -> list[str]:
    """Return for each model and context where it was measured, the picture, what it says and the methods that none beats."""
    lines: list[str] = []
    for (model, context, exact), (path, result) in measured("*/frontier-*.json").items():
        compared = _compared(path, result)
        if compared is None:
            continue
        lines += [
            f"### {short_name(model)}, {context} tokens" + (f", {exact} of them exact in every format" if exact else ""),
            "",
            f"{_source(result)}{_rounded(result)}",
            "",
            f"![KL divergence of all methods against stored and read bits, {short_name(model)} at {context} tokens]"
            f"(assets/{picture_name(path)})",
            "",
            *_with_gap(f"- {sentence.partition(': ')[2]}" for sentence in sentences(compared)),
            *_fronts(compared),
            "",
            *_parts(result.rows),
        ]
    return lines[:-1] if lines and not lines[-1] else lines


def measured_with(result: EvaluationResult) -> str:
    """Return the model, the device and the versions of a result, and the calibration of its recipes."""
    model, environment, calibration = result.model, result.environment, result.calibration
    gpu = environment.get("gpu") or {}
    driver = f", driver {gpu['driver']}" if gpu.get("driver") else ""
    used = ", ".join(f"{name} {environment[name]}" for name in ("torch", "transformers") if environment.get(name))
    elastickv = versions(environment).get("elastickv")
    calibrated = f" Calibrated on {calibration.tokens} tokens of {calibration.text}." if calibration else ""
    return (
        f"{model.name} in {model.dtype} on {model.device_name or environment['cpu']}{driver}; elastickv {elastickv}, {used}; "
        f"{environment['date_utc'][:10]}.{calibrated}"
    )


def _source(result: EvaluationResult) -> str:
    row = result.rows[0]
    return (
        f"{measured_with(result)} {row.windows} windows x {row.scored_tokens // row.windows} scored tokens of "
        f"{', '.join(result.texts)}."
    )


def _compared(path: Path, result: EvaluationResult) -> ComparedMethods | None:
    """Return the methods of a result; None of one that has our recipes alone, and nothing to compare them with."""
    return next(iter(compared_methods([evaluation_view(result, path.name)])), None)


def _with_gap(lines: Iterable[str]) -> list[str]:
    """Return lines with an empty one after them, nothing where there are none."""
    some = list(lines)
    return [*some, ""] if some else []


def _rounded(result: EvaluationResult) -> str:
    """Return a sentence on published formats that were measured after a rounding to 16 bits, where there are any."""
    dtype = result.model.dtype
    published = {row.cache: row.stored_format for row in result.rows if row.stored_format and not row.recipes}
    rounded = [name for name, stored in published.items() if stored.rounded_to(dtype) != dtype]
    if not rounded:
        return ""
    named = "all published formats" if len(rounded) == len(published) else ", ".join(f"`{name}`" for name in rounded)
    return f" Keys and values were rounded to bf16 before {named}, as our caches do."


def _fronts(compared: ComparedMethods) -> Iterator[str]:
    """Yield a table of what no method beats by stored or by read bits, and of ours at each C."""
    fronts = {word: front(_runnable(compared), bits) for word, bits in (("stored", stored_bits), ("read", read_bits))}
    chosen = [
        one for one in _runnable(compared) if any(one in best for best in fronts.values()) or one.loss.cache.startswith("C=")
    ]
    rows = [
        [
            f"`{one.loss.cache}`",
            f"{one.stored_bits:.2f}",
            f"{one.read_bits:.2f}",
            _figure(one.loss.kl, 5),
            _figure(one.loss.top1_percent, 1),
            _figure(one.loss.ppl_percent, 2),
            " and ".join(word for word, best in fronts.items() if one in best),
        ]
        for one in sorted(chosen, key=lambda one: (one.read_bits, one.stored_bits))
    ]
    yield from table(["method", "stored bits", "read bits", "KL", "top-1 %", "PPL change %", "front by bits"], rows)


def _runnable(compared: ComparedMethods) -> list[MethodLoss]:
    return [one for one in compared.losses if one.method != PARTS_METHOD]


def _parts(rows: Sequence[LossRow]) -> Iterator[str]:
    """Yield how much of a ratio's loss is rounding and how much is what is not read, where that was measured."""
    by_name = {row.cache: row for row in rows}
    cells = [
        [name, *(_estimate(by_name[f"{name}{part}"].kl, 5) for part in (FORMATS_ALONE, SELECTION_ALONE, ""))]
        for name in by_name
        if f"{name}{FORMATS_ALONE}" in by_name and f"{name}{SELECTION_ALONE}" in by_name
    ]
    if cells:
        yield from table(["", "KL of its formats, all pages read", "KL of its pages in 16 bit", "KL of both"], cells)
        yield ""


def three_bits() -> list[str]:
    """Return the KL of 4-bit keys with values in 3 and in 4 bits, plain and rotated: on CPUs, which read all of them."""
    names = ("int4", "int4,rotate=kv", "k=int4,v=int3", "k=int4,v=int3,rotate=kv")
    rows, sources = [], []
    for (model, context, _), (_, result) in measured("cpu/frontier-*-4+128.json").items():
        by_name = {row.cache: row for row in result.rows}
        found = [by_name[name] for name in names]
        rows.append([short_name(model), str(context), *(_estimate(row.kl, 5) for row in found)])
        sources.append(_source(result))
    return [
        *table(["model", "context", *(f"`{name}`" for name in names)], rows),
        "",
        "KL with its 95 % interval. " + " ".join(sources),
    ]


def stored_bits_budgets() -> list[str]:
    """Return the loss of formats by layer at each budget of stored bits: on CPUs, which read all of them."""
    rows, sources = [], []
    for (model, context, _), (_, result) in measured("cpu/stored_bits-*.json").items():
        by_name = {row.cache: row for row in result.rows}
        budgets = sorted(float(name.removeprefix(BUDGET)) for name in by_name if name.startswith(BUDGET))
        for bits in budgets:
            of_cache, of_formats = by_name[f"{BUDGET}{bits:g}"], by_name.get(f"{REFERENCE}{BUDGET}{bits:g}")
            alone = "-" if of_formats is None else _estimate(of_formats.kl, 5)
            cells = [_estimate(of_cache.kl, 5), alone, _estimate(of_cache.top1_percent, 1)]
            rows.append([short_name(model), str(context), f"{bits:g}", *cells])
        sources.append(_source(result))
    heads = ["model", "context", "bits at most", "KL through the cache", "KL of the formats alone", "same top-1 %"]
    return [*table(heads, rows), "", "With 95 % intervals. " + " ".join(sources)]


def pictures() -> Iterator[tuple[Path, Chart]]:
    """Yield the results that are compared, each with its picture."""
    for path, result in measured("*/frontier-*.json").values():
        compared = _compared(path, result)
        if compared is not None:
            yield path, next(frontier_charts(1, compared))


def short_name(model: str) -> str:
    """Return a model's name without its suffix and the format of its weights."""
    return model.partition(".gguf")[0].partition(".Q")[0]


def _figure(estimate: IntervalEstimate, digits: int) -> str:
    bounds = "" if estimate.low is None else f" [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
    return f"{estimate.estimate:.{digits}f}{bounds}"


def _estimate(estimate: Estimate, digits: int) -> str:
    return f"{estimate.mean:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def table(headers: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers), *("| " + " | ".join(row) + " |" for row in rows)]
