"""The sections on what speed costs: fidelity, memory, and both in a whole model."""

from collections.abc import Iterable, Iterator, Sequence

from elastickv.html_report.charts.detail_charts import memory_chart, model_charts
from elastickv.html_report.charts.fidelity_charts import error_chart, front, loss_charts, needle_charts, offers
from elastickv.html_report.content import Section, tables
from elastickv.html_report.report_data import RUN, ModelCache, ModelRun, ReportData, Step
from elastickv.html_report.speed_sections import BENCH
from elastickv.results.formats.units import fixed, interval, size


def fidelity(data: ReportData) -> Section:
    """Return errors against bytes."""
    chart, recipe_offers = error_chart(data.steps), offers(data.steps)
    best = front(recipe_offers)
    recipes = (
        {
            "recipe": offer.name,
            "read 1/": fixed(offer.read, 2),
            "recipe error": fixed(offer.error.estimate, 4),
            "front": "yes" if offer in best else "",
        }
        for offer in recipe_offers
    )
    losses = (
        {
            "model": evaluation.model,
            "context": str(loss.context),
            "cache": loss.cache,
            "read 1/": fixed(loss.read, 2),
            "stored 1/": fixed(loss.stored, 2),
            "perplexity, %": interval(loss.ppl_percent, 2),
            "KL, nats": interval(loss.kl, 4),
            "same top-1, %": interval(loss.top1_percent, 1),
            "greedy leaves at": loss.greedy,
            "recipe": loss.recipe,
        }
        for evaluation in data.evaluations
        for loss in evaluation.caches
    )
    return Section(
        "fidelity",
        "Fidelity against bytes",
        "Fewer bytes to the right, more error upwards. A recipe on the Pareto front is one that no other beats in both at "
        "once. The recipe error is relative L2 of a head's output against dense attention, on real activations; perplexity, KL "
        "and top-1 are of a model that decodes through the cache.",
        charts=[*([chart] if chart else []), *loss_charts(data.evaluations)],
        tables=[
            *tables("Recipes by bytes, each where it reads least", recipes, ("recipe", "front")),
            *tables("What a model's predictions lose, with 95 % intervals over windows", losses, ("model", "cache", "recipe")),
        ],
        notes=[evaluation.suggestion for evaluation in data.evaluations if evaluation.suggestion],
        missing="a result of elastickv bench with a recipe error, or one of elastickv eval",
    )


def needle(data: ReportData) -> Section:
    """Return the pass keys found."""
    charts, left = needle_charts(data.evaluations)
    rows = (
        {
            "model": evaluation.model,
            "tokens": str(needle.tokens),
            "cache": needle.cache,
            "found": str(needle.hits),
            "of": str(needle.tried),
        }
        for evaluation in data.evaluations
        for needle in evaluation.needles
    )
    return Section(
        "needle",
        "Pass keys found",
        "A number is hidden in a text at some depth and asked for at its end. Each cell: how many were found of how many "
        "tried, by length and cache (downwards) and depth (across). 'full' is full attention: what the model itself can do.",
        charts=charts,
        tables=tables("All depths together", rows, ("model", "cache")),
        notes=[f"{left} rows more are in the table"] if left else (),
        missing="a result of elastickv eval with --needle",
    )


def models(data: ReportData) -> Section:
    """Return whole models, decoding with each cache."""
    rows = (
        {
            "model": f"{model.model} {model.dtype}",
            "context × batch": f"{model.context} × {model.batch}",
            "requested": model.requested,
            "cache": cache.name,
            "ms a token": interval(cache.step_ms, 2),
            "tokens/s": fixed(cache.tokens_per_s, 2),
            "speed-up": _ratio(model, cache),
            "KL, nats": fixed(cache.quality.kl_mean if cache.quality else None, 4),
            "perplexity": fixed(cache.quality.perplexity if cache.quality else None, 3),
            "× of the floor": fixed(cache.of_floor, 2),
            "first token, s": fixed(cache.first_token_s, 3),
            "result": data.names[model.provenance.source],
        }
        for model in data.models
        for cache in model.caches
        if model.program != RUN
    )
    return Section(
        "models",
        "Whole model",
        "A model that decodes with the stock cache, a static one and the elastic one in turns; 95 % intervals. The floor is a "
        "step's bytes, weights and cache, at the measured read ceiling. What elastickv run generated is one text, timed once.",
        charts=list(model_charts(data.models)),
        tables=[
            *tables("Decoding with each cache", rows, ("model", "requested", "cache", "result")),
            *tables("Generated once by elastickv run", _runs(data), ("model", "requested", "cache", "stock's text", "result")),
        ],
        notes=[
            f"{model.model}, {model.context} × {model.batch}: {name} was not run: {why}"
            for model in data.models
            for name, why in model.not_run.items()
        ],
        missing="a result of elastickv bench --model, run or baseline",
    )


def _runs(data: ReportData) -> Iterator[dict[str, str]]:
    for model in data.models:
        for cache in model.caches if model.program == RUN else ():
            yield {
                "model": f"{model.model} {model.dtype}",
                "prompt tokens": str(model.context),
                "new tokens": str(cache.new_tokens),
                "requested": model.requested,
                "cache": cache.name,
                "tokens/s": fixed(cache.tokens_per_s, 2),
                "first token, s": fixed(cache.first_token_s, 3),
                "speed-up": _ratio(model, cache),
                "KV read a step": size(cache.read_bytes),
                "KV stored": size(cache.stored_bytes),
                "stock's text": model.text,
                "result": data.names[model.provenance.source],
            }


def _ratio(model: ModelRun, cache: ModelCache) -> str:
    """Return the ratios that belong to a cache: of the elastic one against each other, in that one's row."""
    name = cache.name
    ratios = [r for r in model.ratios if (r.slow if r.fast == "elastic" else r.fast) == name]
    return "; ".join(f"{ratio.fast} / {ratio.slow} {interval(ratio.times, 3, '×')}" for ratio in ratios)


def memory(data: ReportData) -> Section:
    """Return bytes read and stored, and what a model holds."""
    chart = memory_chart(data.steps)
    held = (
        {
            "model": model.model,
            "context × batch": f"{model.context} × {model.batch}",
            "cache": cache.name,
            "KV read a step": size(cache.read_bytes),
            "read 1/": fixed(cache.read_ratio, 2),
            "KV stored": size(cache.stored_bytes),
            "stored 1/": fixed(cache.stored_ratio, 2),
            "KV a token": size(cache.bytes_per_token),
            "stored 1/, all layers": fixed(cache.model_stored_ratio, 2),
            "held, as measured": size(cache.held_bytes),
            "held 1/": fixed(cache.held_ratio, 2),
            "held 1/, all layers": fixed(cache.model_held_ratio, 2),
            "peak beyond weights": size(cache.peak_bytes),
        }
        for model in data.models
        for cache in model.caches
    )
    formats = (
        {
            "model": model.model,
            "context": str(model.context),
            "our format": own.recipe,
            "KV a token": size(own.kv_bytes_per_token),
            "stored 1/": fixed(own.stored_ratio, 2),
        }
        for model in data.models
        for own in model.formats
    )
    return Section(
        "memory",
        "Memory",
        "What one step reads of one layer's cache, by part, as a share of what dense reads in 16 bit; the black mark is what "
        "is stored. Selection saves reads alone, formats save both. All bytes are counted: codes, scales, what scoring reads, "
        "page lists, sinks and window.",
        charts=[chart] if chart else [],
        tables=[
            *tables("One layer's keys and values, in one step", _bytes(data.steps), ("recipe", "shape")),
            *tables("A model's memory", held, ("model", "cache")),
            *tables("Our formats for the same layers, beside those of another program", formats, ("model", "our format")),
        ],
        missing=BENCH,
    )


def _bytes(steps: Sequence[Step]) -> Iterator[dict[str, str]]:
    for step in _distinct(steps):
        if step.memory is not None:
            yield {
                "recipe": step.what,
                "context": str(step.context),
                "shape": step.shape,
                "dense reads": size(step.memory.dense_bytes_per_step),
                "reads": size(sum(step.read_bytes.values())),
                "read 1/": fixed(step.read, 2),
                "largest step": size(step.memory.largest_step_bytes),
                "stored": size(step.memory.stored_bytes),
                "stored 1/": fixed(step.stored, 2),
            }


def _distinct(steps: Sequence[Step]) -> Iterable[Step]:
    """Return one step for each recipe and workload: bytes are counted, not measured."""
    return {(step.what, step.context, step.shape): step for step in steps}.values()
