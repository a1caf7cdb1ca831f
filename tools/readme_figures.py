"""What the README shows of result files: the output of its first command, and one table of results."""

import json
from pathlib import Path
from typing import TypeVar

from elastickv.benchmark import Result
from elastickv.benchmark.stats.intervals import Interval
from elastickv.results.formats import FORMATS
from elastickv.results.kinds.evaluation_result import EvaluationResult
from elastickv.results.kinds.model_result import ModelBenchResult

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
QUICKSTART = "cpu/quickstart.json"
MODEL_RUNS = ("h100/model-8b-4096x1.json", "h100/model-8b-32768x1.json", "h100/model-8b-65536x1.json",
              "h100/model-8b-32768x8.json")  # fmt: skip
STEP_RUNS = ("h100/131072.json", "h100/kernels/1-32-8-128-131072--auto-8.json")
EVALUATIONS = ("cpu/fidelity-smollm2-135m-4096.json", "cpu/fidelity-smollm2-135m-7168.json")
HEADERS = ("context", "batch", "C", "dense 16-bit cache", "ElasticKV", "speed-up [95 %]", "KL, nats/token", "recipe error")
Kind = TypeVar("Kind", Result, ModelBenchResult, EvaluationResult)


def quickstart() -> list[str]:
    """Return the terminal output of the README's first command, as a code block."""
    text = FORMATS["table"](_load(Result, QUICKSTART))
    return ["```text", *map(str.rstrip, text.rstrip("\n").split("\n")), "```"]


def results() -> list[str]:
    """Return the README's table: a whole model in ms per token, one attention layer in us per step, and the quality cost."""
    models, steps = [_load(ModelBenchResult, path) for path in MODEL_RUNS], [_load(Result, path) for path in STEP_RUNS]
    evaluations = [_load(EvaluationResult, path) for path in EVALUATIONS]
    samples = {step.configuration.compression: step.fidelity.sample for step in steps}
    errors = {compress: sample.recipe_error.mean for compress, sample in samples.items() if sample is not None}
    rows = [(*_model_cells(model), *_quality(model.compress, model.context, errors, evaluations)) for model in models]
    for step in steps:
        used = step.configuration
        rows.append((*_step_cells(step), *_quality(used.compression, used.seq_len, errors, evaluations)))
    contexts = " or ".join(str(row.context) for evaluation in evaluations for row in evaluation.rows[:1])
    table = ["| " + " | ".join(HEADERS) + " |", "|" + "---|" * len(HEADERS), *("| " + " | ".join(row) + " |" for row in rows)]
    model, machine = models[0].model.name, models[0].machine["name"]
    notes = [
        f"{machine}, bf16. ms/token: `generate` with an 8B model (`{model}`, random weights) against the faster of "
        "Transformers' default cache and its static cache with `torch.compile`. us/step: decode attention of one layer (32 "
        "query heads, 8 KV heads, head_dim 128) against the fastest dense kernel.",
        "",
        f"KL: KL(full attention || ElasticKV) of {evaluations[0].model.name.partition('.')[0]} with calibrated recipes at the "
        f"same C and the nearest evaluated context ({contexts} tokens); the timed recipes are not calibrated. Recipe error: "
        "mean relative L2 error of a head's output on real activations at the same C.",
    ]
    return [*table, "", *notes]


def _load(kind: type[Kind], path: str) -> Kind:
    return kind.from_dict(json.loads((RESULTS / path).read_text(encoding="utf-8")), path)


def _interval(speedup: Interval | None) -> str:
    return "-" if speedup is None else f"{speedup.estimate:.2f}x [{speedup.low:.2f}, {speedup.high:.2f}]"


def _model_cells(result: ModelBenchResult) -> tuple[str, ...]:
    step_ms = {cache.cache: cache.step_ms.estimate for cache in result.caches if cache.step_ms}
    stock = result.baseline
    return (
        str(result.context),
        str(result.batch),
        f"{result.compress:g}",
        "out of memory" if stock is None else f"{step_ms[stock]:.1f} ms/token",
        f"{step_ms['elastic']:.1f} ms/token",
        "-" if stock is None else _interval(result.speedups[stock]),
    )


def _step_cells(result: Result) -> tuple[str, ...]:
    times_us = {timing.name: 1e3 * timing.time_ms for timing in result.contenders}
    configuration = result.configuration
    return (
        str(configuration.seq_len),
        str(configuration.batch),
        f"{configuration.compression:g}",
        f"{times_us[result.baseline.name]:.0f} us/step",
        f"{times_us['elastic']:.0f} us/step",
        _interval(result.speedup),
    )


def _quality(
    compress: float | None, context: int, errors: dict[float, float], evaluations: list[EvaluationResult]
) -> tuple[str, str]:
    """Return the KL and the recipe error measured at a run's C, or '-' where no result file has one."""
    rows = [row for evaluation in evaluations for row in evaluation.rows if row.compress == compress]
    nearest = min(rows, key=lambda row: abs(row.context - context), default=None)
    error = errors.get(compress or 0)
    return ("-" if nearest is None else f"{nearest.kl.mean:.4f}"), ("-" if error is None else f"{error:.3f}")
