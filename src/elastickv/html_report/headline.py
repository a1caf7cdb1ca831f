"""The sentence that a page begins with: one result, its speed-up with its interval, and its quality cost."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from elastickv.html_report.comparisons.method_losses import ComparedMethods, compared_methods, front, stored_bits
from elastickv.html_report.method_labels import step_label
from elastickv.html_report.report_data import Evaluation, IntervalEstimate, ModelRun, ReportData, Serving, Soak, Step
from elastickv.html_report.serving_results import fastest_step
from elastickv.results.formats.units import NO_INTERVAL, fixed, interval
from elastickv.results.kinds.original_result import OriginalResult
from elastickv.results.kinds.sweep_record import UnmeasuredCell

_MOST_TILES = 4
_FEW = 3  # files, each of which is named with its reason
ERROR_UNKNOWN = "recipe error not measured"


@dataclass(frozen=True)
class Headline:
    """What comes first.

    Attributes
    ----------
    source : the result that it describes.
    sentence : its speed-up with the interval, and its quality cost.
    tiles : its figures one by one: label, value, and a note.
    beside : sentences on all results together.
    """

    source: str
    sentence: str
    tiles: Sequence[tuple[str, str, str]]
    beside: Sequence[str]


def headline_of(data: ReportData) -> Headline:
    """Return the headline: of a decode step where one was measured, else of a model's decode, its predictions, or a server.

    Beside it stands what is not on the page: cells that sweeps lack, and files that cannot be read.
    """
    headline = _measured(data)
    left_out = [f"Left out: {reason}" for reason in data.unreadable]
    if len(left_out) > _FEW:
        left_out = [f"Left out: {len(left_out)} files, which cannot be read or are no result; Warnings names them."]
    return replace(headline, beside=[*headline.beside, *(f"{line}." for line in data.incomplete), *left_out])


def _measured(data: ReportData) -> Headline:
    step = best_step(data.steps)
    if step is not None:
        return _of_step(step, [*_all_steps(data.steps), *_all_models(data.models)])
    if data.models:
        return _of_model(best_model(data.models))
    if data.evaluations:
        return _of_evaluation(data.evaluations[0])
    if data.servings:
        return _of_serving(data.servings[0])
    return _of_soak(data.soaks[0]) if data.soaks else _of_unmeasured(data.unmeasured)


def best_step(steps: Sequence[Step]) -> Step | None:
    """Return the decode step of the largest speed-up: its lower bound, so that a wide interval wins nothing."""
    measured = [step for step in steps if step.speedup is not None]
    return max(measured, key=lambda step: _rank(step.speedup), default=steps[0] if steps else None)


def best_model(models: Sequence[ModelRun]) -> ModelRun:
    """Return the model's run of the largest speed-up against its baseline, by its lower bound."""
    return max(models, key=lambda model: _rank(model.best.times if model.best else None))


def _rank(ratio: IntervalEstimate | None) -> tuple[bool, float]:
    """Return the key that orders speed-ups; those with an interval come first."""
    if ratio is None:
        return (False, 0.0)
    return (ratio.low is not None, ratio.estimate if ratio.low is None else ratio.low)


def _of_step(step: Step, beside: Sequence[str]) -> Headline:
    ratio, error = step.speedup, step.error
    where = f"{step.provenance.device}, {step.context} tokens, {step.shape}"
    fast = f"at {_figure(ratio)} times the speed of {step.baseline}" if ratio else f"in {step.elastic_ms:.4g} ms"
    bounds = "95 % interval" if ratio and ratio.low is not None else _why_no_interval(step)
    reads = f", and reads 1/{step.read:.2f} of the dense bytes" if step.read else ""
    cost = (
        f"Its recipe error is {error.mean:.4f} on average and {error.p95:.4f} at the 95th percentile{_error_source(step)}."
        if error
        else f"Its {ERROR_UNKNOWN}: the speed alone says nothing of what the output lost."
    )
    tiles = [
        ("speed-up", f"{ratio.estimate:.3f}×" if ratio else "-", f"{_range(ratio)} against {step.baseline}"),
        ("bytes read", f"1/{step.read:.2f}" if step.read else "-", f"of dense; stored 1/{fixed(step.stored, 2) or '-'}"),
        ("recipe error", f"{error.mean:.4f}" if error else "-", f"mean; p95 {error.p95:.4f}" if error else "not measured"),
        ("decode step", f"{1e3 * step.elastic_ms:.4g} µs", f"dense {1e3 * step.dense_ms:.4g} µs" if step.dense_ms else ""),
    ]
    return Headline(
        step.provenance.source,
        f"On {where}, {step.what} decodes {fast} ({bounds}){reads}. {cost}",
        tiles,
        beside,
    )


def _figure(ratio: IntervalEstimate) -> str:
    """Return a ratio with its interval, or alone: the sentence says why it has none."""
    return interval(ratio) if ratio.low is not None else f"{ratio.estimate:.3f}"


def _why_no_interval(step: Step) -> str:
    """Return why a speed-up has no bounds: of the original program's there are no samples, of others too few pairs."""
    return "no interval in the file" if isinstance(step.result, OriginalResult) else NO_INTERVAL


def _error_source(step: Step) -> str:
    """Return the data that the error was measured on, and its recipe where that is not the timed one."""
    if step.error is None:
        return ""
    other = f" of {step.error_recipe}, the recipe for that context" if step.error_recipe != step.recipe else ""
    return f" (relative L2 against dense attention; {step.error.measured_on}{other})"


def _range(ratio: IntervalEstimate | None) -> str:
    if ratio is None:
        return "no ratio in the file"
    return "no interval" if ratio.low is None else f"[{ratio.low:.3f}, {ratio.high:.3f}]"


def _of_model(model: ModelRun) -> Headline:
    best, name = model.best, "elastic" if any(cache.name == "elastic" for cache in model.caches) else None
    own = next(cache for cache in model.caches if name is None or cache.name == name)
    if best is not None:
        own = next((cache for cache in model.caches if cache.name == best.fast), own)
        bounds = "95 % interval" if best.times.low is not None else NO_INTERVAL
        fast = f"decodes at {_figure(best.times)} times the speed of the cache '{best.slow}' ({bounds})"
    else:
        rate = f"decodes {own.tokens_per_s:.2f} tokens/s" if own.tokens_per_s else "made one token, which no decode step gave"
        fast = f"{rate}; no other cache ran beside it"
    reads = f", and reads 1/{own.read_ratio:.2f} of the dense 16-bit bytes" if own.read_ratio else ""
    requested = f" ({model.requested})" if model.requested else ""
    delta = own.quality
    cost = (
        f"The KL divergence of its predictions is {delta.kl_mean:.4f} nats a token, and {delta.top1_percent:.1f} % of the "
        f"most likely tokens are the same ({delta.tokens} tokens of {delta.text}, against {delta.reference})."
        if delta
        else "What its predictions lose was not measured in this file: `elastickv eval` does."
    )
    ratio = own.read_ratio or own.stored_ratio
    tiles = [
        ("speed-up", f"{best.times.estimate:.3f}×" if best else "-", _range(best.times) if best else "no other cache"),
        (f"bytes {'read' if own.read_ratio else 'stored'}", f"1/{ratio:.2f}" if ratio else "-", "of dense 16 bit"),
        ("KL", f"{delta.kl_mean:.4f}" if delta else "-", "nats a token" if delta else "not measured"),
        ("a token", f"{own.step_ms.estimate:.2f} ms" if own.step_ms else "-", "whole model"),
    ]
    where = f"On {model.provenance.device}, {model.context} tokens × {model.batch}"
    return Headline(
        model.provenance.source,
        f"{where}, {model.model} with the cache '{own.name}'{requested} {fast}{reads}. {cost}",
        tiles,
        (),
    )


def _of_unmeasured(cells: Sequence[UnmeasuredCell]) -> Headline:
    counts = Counter(cell.status for cell in cells)
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    sentence = f"No cell was measured: of {len(cells)} cells {said}. The reasons are under Warnings."
    return Headline(cells[0].sweep, sentence, [(status, str(count), "cells") for status, count in counts.items()], ())


def _of_evaluation(evaluation: Evaluation) -> Headline:
    measured = [loss for loss in evaluation.caches if loss.read is not None]
    compared = [each for each in compared_methods([evaluation]) if each.formats]
    if not measured and compared:
        return _of_formats(evaluation, max(compared, key=lambda each: each.context))
    if not measured:
        hits, tried = (sum(getattr(needle, name) for needle in evaluation.needles) for name in ("hits", "tried"))
        sentence = f"{evaluation.model} finds {hits} of {tried} pass keys, over all caches and depths that were tried."
        return Headline(evaluation.provenance.source, sentence, [("pass keys", f"{hits} of {tried}", "all caches")], ())
    most = max(measured, key=lambda loss: (loss.read or 0, loss.context))
    ppl, kl, top1 = interval(most.ppl_percent, 2, " %"), interval(most.kl, 4), interval(most.top1_percent, 1, " %")
    tiles = [
        ("bytes read", f"1/{most.read:.2f}", f"stored 1/{fixed(most.stored, 2) or '-'}"),
        ("perplexity", f"{most.ppl_percent.estimate:+.2f} %", _range(most.ppl_percent)),
        ("KL", f"{most.kl.estimate:.4f}", "nats a token"),
        ("same top-1", f"{most.top1_percent.estimate:.1f} %", _range(most.top1_percent)),
    ]
    bounds = "one window alone has no interval" if most.kl.low is None else "95 % intervals over windows"
    sentence = (
        f"{evaluation.model} with {most.cache} at {most.context} tokens reads 1/{most.read:.2f} of the dense bytes; its "
        f"perplexity changes by {ppl}, the KL divergence of its predictions is {kl} nats a token, and its most likely token is "
        f"the same in {top1} ({bounds}). No speed was measured in these files."
    )
    return Headline(evaluation.provenance.source, sentence, tiles, [evaluation.suggestion] if evaluation.suggestion else ())


def _of_formats(evaluation: Evaluation, compared: ComparedMethods) -> Headline:
    losses = compared.formats
    least, most = (choose(losses, key=lambda loss: loss.kl.estimate) for choose in (min, max))
    bits = [loss.stored_bits or 0.0 for loss in losses]
    sentence = (
        f"{evaluation.model} decodes with {len(losses)} KV formats at {compared.context} tokens, of {min(bits):.2f} "
        f"to {max(bits):.2f} stored bits an element; the KL divergence of its predictions is from {least.kl.estimate:.2g} "
        f"({least.cache}) to {most.kl.estimate:.2g} nats a token ({most.cache}). No speed was measured in these files."
    )
    best = front([one for one in compared.losses if one.loss.stored_bits is not None], stored_bits)[:_MOST_TILES]
    tiles = [(one.loss.cache, f"{one.stored_bits:.2f} bits", f"KL {one.loss.kl.estimate:.2g}") for one in best]
    return Headline(evaluation.provenance.source, sentence, tiles, ())


def _of_serving(serving: Serving) -> Headline:
    fastest, result = fastest_step(serving.result), serving.result
    where = f"{serving.provenance.device}, vLLM {result.device.vllm or 'of an unknown version'}, {result.model}"
    if fastest is None:
        return Headline(serving.provenance.source, f"On {where}, no step was timed beside the baseline.", (), ())
    name, step = fastest
    ratio = interval(step.of_baseline)
    sentence = (
        f"On {where}, {step.batch} requests of {step.context} tokens decode with {name} in {ratio} of the time of "
        f"{result.baseline} (bounds: single rounds). The speed alone says nothing of what the output lost."
    )
    return Headline(serving.provenance.source, sentence, [("a step", f"{step.ms:.2f} ms", name)], ())


def _of_soak(soak: Soak) -> Headline:
    judged = [verdict for verdict in soak.result.verdicts if verdict.holds is not None]
    held = sum(verdict.holds is True for verdict in judged)
    sentence = f"On {soak.provenance.device}, {held} of {len(judged)} things hold that were asked of vLLM under a random load."
    return Headline(soak.provenance.source, sentence, (), ())


def _all_steps(steps: Sequence[Step]) -> Iterator[str]:
    """Yield a sentence on all decode steps: how many are faster, and the slowest."""
    measured = [step for step in steps if step.speedup is not None]
    if len(measured) < 2:
        return
    least = min(measured, key=lambda step: step.speedup.estimate if step.speedup else 0)
    how = step_label(least, measured)
    faster, with_floor = sum(step.faster is True for step in measured), sum(step.faster is not None for step in measured)
    beyond = (
        f"{faster} of {with_floor} are faster than dense beyond the noise floor" if with_floor else "none has a noise floor"
    )
    yield (
        f"It is the largest speed-up of {len(measured)} results on this page: {beyond}; the smallest is "
        f"{interval(least.speedup)} ({', '.join(filter(None, (least.what, f'{least.context} tokens', least.shape, how)))})."
    )


def _all_models(models: Sequence[ModelRun]) -> Iterator[str]:
    best = best_model(models).best if models else None
    if best is not None:
        model = best_model(models)
        yield (
            f"Whole model: {model.model} with {' '.join(part for part in (best.fast, model.requested) if part)} at "
            f"{model.context} tokens × {model.batch} decodes at {interval(best.times)} times the speed of {best.slow}."
        )
