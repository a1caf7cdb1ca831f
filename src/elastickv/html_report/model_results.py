"""Results of whole models as the page shows them: speed of `bench --model` and `baseline`, losses of `eval`."""

from collections.abc import Iterator, Mapping

from elastickv.benchmark.stats.intervals import Interval
from elastickv.html_report.provenance import provenance
from elastickv.html_report.report_data import (
    BENCH,
    RUN,
    Evaluation,
    IntervalEstimate,
    Loss,
    ModelCache,
    ModelRun,
    Needle,
    Ratio,
)
from elastickv.html_report.step_results import interval_of
from elastickv.results.compare.from_results import kv_read_bytes_per_step
from elastickv.results.compare.runs import BenchmarkRun
from elastickv.results.kinds.evaluation_result import EvaluationResult, LossRow, PassKeyRow, SuggestedRatio
from elastickv.results.kinds.gguf_result import GgufBaseline, KvCache
from elastickv.results.kinds.model_result import (
    ELASTIC,
    CacheRecord,
    ModelBenchResult,
    QualityDelta,
    RunResult,
    TransformersBaseline,
)
from elastickv.results.speed_ratios import SpeedRatio, gguf_ratios, model_ratios


def model_of(run: BenchmarkRun) -> ModelRun:
    """Return a model's decode with each cache."""
    if isinstance(run.result, GgufBaseline):
        return _gguf(run.result, run)
    if isinstance(run.result, RunResult):
        return _generation(run.result, run)
    return _transformers(run.result, run)


def _transformers(result: ModelBenchResult, run: BenchmarkRun) -> ModelRun:
    delta, warnings = None, list(result.host_flags)
    warnings += [f"{name} was not run: {why}" for name, why in result.not_run.items()]
    if isinstance(result, TransformersBaseline):
        delta = result.fidelity
        if result.fidelity_not_measured is not None:
            warnings.append(f"fidelity not measured: {result.fidelity_not_measured}")
    if result.model.random_weights:
        warnings.append("random weights: speed and bytes are a model's of this shape, its text is none")
    return ModelRun(
        provenance=provenance(
            run.source,
            run.device,
            result.environment,
            warnings,
            command=result.command,
            driver=result.machine.get("driver"),
        ),
        model=result.model.name,
        dtype=result.model.dtype,
        context=result.context,
        batch=result.batch,
        requested=result.recipe or "" if result.compress is None else f"C={result.compress:g}",
        caches=tuple(_cache(cache, delta if cache.cache == ELASTIC else None) for cache in result.caches),
        ratios=_ratios(model_ratios(result), result.baseline),
        formats=(),
        not_run=result.not_run,
        program=BENCH,
    )


def _generation(result: RunResult, run: BenchmarkRun) -> ModelRun:
    cell = dict(run.cell.pairs)
    text = {True: "the same", False: "another"}.get(result.same_text) if result.same_text is not None else None
    return ModelRun(
        provenance=provenance(run.source, run.device, result.environment, (), command=result.command),
        model=result.model.name,
        dtype=result.model.dtype,
        context=cell["prompt tokens"],
        batch=cell["batch"],
        requested=result.recipe or "" if result.compress is None else f"C={result.compress:g}",
        caches=tuple(_cache(cache, None) for cache in result.caches),
        ratios=_ratios(model_ratios(result), None),
        formats=(),
        not_run={},
        program=RUN,
        text=text or "",
    )


def _gguf(result: GgufBaseline, run: BenchmarkRun) -> ModelRun:
    reasons = ("formats_not_counted", "bytes_not_counted", "fidelity_not_measured")
    missing = {name.replace("_", " "): getattr(result, name) for name in reasons}
    warnings = [f"{name}: {why}" for name, why in missing.items() if why is not None]
    return ModelRun(
        provenance=provenance(run.source, run.device, result.environment, warnings, command=result.command),
        model=result.model.name,
        dtype="",
        context=result.context,
        batch=1,
        requested="",
        caches=tuple(_kv_cache(cache, result.tokens) for cache in result.caches),
        ratios=_ratios(gguf_ratios(result), result.baseline),
        formats=result.formats,
        not_run={},
        program="baseline gguf",
    )


def _ratios(ratios: Mapping[str, SpeedRatio], baseline: str | None) -> tuple[Ratio, ...]:
    """Return the ratios of times that were measured, the baseline's first."""
    ordered = sorted(ratios, key=lambda name: name != baseline)
    measured = (ratios[name] for name in ordered)
    return tuple(Ratio(r.fast, r.slow, IntervalEstimate(r.estimate, r.low, r.high)) for r in measured)


def _step_ms(step_ms: Interval | None, tokens_per_s: float | None, rows: int) -> IntervalEstimate | None:
    """Return the time of a step: where it has no interval, the mean that its speed says."""
    if step_ms is None and tokens_per_s is not None:
        return IntervalEstimate(1e3 * rows / tokens_per_s)
    return interval_of(step_ms)


def _cache(cache: CacheRecord, delta: QualityDelta | None) -> ModelCache:
    return ModelCache(
        name=cache.cache,
        step_ms=_step_ms(cache.step_ms, cache.tokens_per_s, cache.rows),
        tokens_per_s=cache.tokens_per_s,
        new_tokens=cache.new_tokens,
        of_floor=cache.of_floor,
        read_ratio=cache.read_ratio,
        stored_ratio=cache.stored_ratio,
        held_ratio=cache.held_ratio,
        model_stored_ratio=cache.model_stored_ratio,
        model_held_ratio=cache.model_held_ratio,
        read_bytes=kv_read_bytes_per_step(cache),
        stored_bytes=cache.kv_stored_bytes,
        held_bytes=cache.held_bytes,
        peak_bytes=cache.peak_bytes,
        first_token_s=cache.first_token_s,
        quality=delta,
        token_ms=tuple(1e3 * second for steps in cache.step_s or () for second in steps),
    )


def _kv_cache(cache: KvCache, tokens: int) -> ModelCache:
    return ModelCache(
        name=cache.cache,
        step_ms=_step_ms(cache.step_ms, cache.tokens_per_s, 1),
        tokens_per_s=cache.tokens_per_s,
        stored_ratio=cache.stored_ratio,
        bytes_per_token=cache.kv_bytes_per_token,
        quality=cache.fidelity,
        # A sample is of several tokens.
        token_ms=tuple(1e3 * (second / tokens) for second in cache.decode_s),
    )


def evaluation_view(result: EvaluationResult, source: str) -> Evaluation:
    """Return what a model's predictions lost."""
    model, calibration = result.model, result.calibration
    device = model.device_name or result.environment.get("cpu") or model.device
    skipped = [f"left out: {reason}" for reason in result.skipped]
    skipped += [f"left out: {reason}" for row in result.needle for reason in row.skipped]
    skipped += list(dict.fromkeys(f"left out: {reason}" for task in result.tasks for reason in task.skipped))
    if calibration is None and not result.of_formats:
        skipped.append("not calibrated: every head reads the same share of its pages")
    return Evaluation(
        provenance=provenance(source, str(device), result.environment, [*result.warnings, *skipped], command=result.command),
        model=result.model_name,
        dtype=model.dtype,
        texts=result.texts,
        calibration="" if calibration is None else f"{calibration.tokens} tokens of {calibration.text}",
        losses=tuple(_loss(row, result.model.dtype) for row in result.rows),
        needles=tuple(needle for row in result.needle for needle in _needles(row)),
        suggestion=_suggestion(result.suggestion),
        exact_tokens=result.exact_tokens,
        generations=result.generations or (),
        tasks=result.tasks,
    )


def _loss(row: LossRow, dtype: str) -> Loss:
    greedy = f"{row.greedy.mean_first_different:.0f} of {row.greedy.tokens}" if row.greedy else ""
    recipes = list(dict.fromkeys(row.recipes or ()))
    stored = row.stored_format
    published = stored.source if stored else row.selection.source if row.selection else row.quantiser
    named = recipes[0] if len(recipes) == 1 else f"{len(recipes)} recipes" if recipes else published
    return Loss(
        context=row.context,
        cache=row.cache,
        recipe=" ".join(part for part in (named, row.recipe_hash) if part),
        read=row.read_ratio,
        stored=row.stored_ratio,
        ppl_percent=IntervalEstimate.over(row.ppl_change_percent, row.windows),
        kl=IntervalEstimate.over(row.kl, row.windows),
        top1_percent=IntervalEstimate.over(row.top1_percent, row.windows),
        greedy=greedy,
        bits=stored.bits_per_element if stored else None,
        stored_bits=stored.stored_bits_per_element if stored else None,
        read_bytes=row.step_bytes_read,
        selection=row.selection.method if row.selection else None,
        exact_dtype=stored.rounded_to(dtype) if stored else None,
    )


def _needles(row: PassKeyRow) -> Iterator[Needle]:
    for cache, answers in row.found.items():
        counts: dict[float, tuple[int, int]] = {}
        for depth, hit in zip(row.depths, answers, strict=True):
            hits, tried = counts.get(depth, (0, 0))
            counts[depth] = hits + hit, tried + 1
        yield Needle(row.tokens, cache, counts)


def _suggestion(suggestion: SuggestedRatio | None) -> str:
    if suggestion is None:
        return ""
    if suggestion.compress is None:
        return f"No C that was measured is within {suggestion.tolerance}."
    unsure = "" if suggestion.certain else " (its interval is not: measure more windows)"
    return f"Largest C within {suggestion.tolerance}: {suggestion.compress:g}{unsure}."
