"""Results of whole models as the page shows them: speed of `bench --model` and `baseline`, losses of `eval`."""

from typing import Any

from elastickv.errors import UsageError
from elastickv.html_report.provenance import estimate, lines, optional_number, provenance, reasons
from elastickv.html_report.report_data import (
    Evaluation,
    IntervalEstimate,
    Loss,
    ModelCache,
    ModelRun,
    Needle,
    Ratio,
    ReportedQualityDelta,
    StoredFormat,
)
from elastickv.results.compare.runs import BenchmarkRun
from elastickv.results.documents import Document
from elastickv.results.readers import Reader

EVALUATION = "elastickv-fidelity"
EVALUATION_VERSION = 1


def model_of(document: Document, run: BenchmarkRun) -> ModelRun:
    """Return what a model took with each cache, a result whose `run` has been read.

    Raises
    ------
    UsageError : naming the file and what it lacks.
    """
    reader = Reader(document.source, document.value)
    cell = dict(run.cell.pairs)
    not_run = reasons(reader, "not_run")
    warnings = [*lines(reader, "warnings"), *lines(reader, "host", "flags")]
    warnings += [f"{name} was not run: {why}" for name, why in not_run.items()]
    for name in ("formats_not_counted", "bytes_not_counted", "fidelity_not_measured"):
        if reader.optional(name) is not None:
            warnings.append(f"{name.replace('_', ' ')}: {reader.text(name)}")
    if reader.optional("model", "random_weights"):
        warnings.append("random weights: speed and bytes are a model's of this shape, its text is none")
    return ModelRun(
        provenance=provenance(reader, run.device, warnings),
        model=str(cell["model"]),
        dtype=str(cell.get("dtype", "")),
        context=cell.get("context"),
        batch=cell.get("batch"),
        requested=_asked(reader),
        caches=tuple(_cache(reader, cache) for cache in reader.at("caches", kind=list)),
        ratios=_ratios(reader),
        formats=tuple(_format(reader, found) for found in reader.optional("formats") or ()),
        not_run=not_run,
    )


def _asked(reader: Reader) -> str:
    """Return C or the recipe that was asked for; nothing where a file tells neither."""
    compress, recipe = (reader.optional(name) for name in ("compress", "recipe"))
    return str(recipe or "") if compress is None else f"C={reader.positive('compress'):g}"


def _ratios(reader: Reader) -> tuple[Ratio, ...]:
    """Return the ratios of times: of elastic against each stock cache, of each type of another program against its first."""
    names, baseline = reader.optional("speedups") or {}, reader.optional("baseline")
    own = any(cache.get("cache") == "elastic" for cache in reader.at("caches", kind=list))
    found = []
    for name in sorted(map(str, names), key=lambda name: name != baseline):
        times = estimate(reader, "speedups", name)
        if times is not None:
            found.append(Ratio("elastic", name, times) if own else Ratio(name, reader.text("baseline"), times))
    return tuple(found)


def _format(reader: Reader, found: Any) -> StoredFormat:
    one = Reader(reader.source, found if isinstance(found, dict) else {})
    return StoredFormat(one.text("recipe"), one.positive("kv_bytes_per_token"), one.positive("stored_ratio"))


def _price(reader: Reader) -> ReportedQualityDelta | None:
    """Return what is under `fidelity`; None where predictions were not measured."""
    if reader.optional("fidelity") is None:
        return None
    at = "fidelity"
    on = f"{reader.count(at, 'tokens')} tokens of {reader.text(at, 'text')}, against {reader.text(at, 'reference')}"
    return ReportedQualityDelta(on, *(reader.number(at, name) for name in ("perplexity", "kl_mean", "top1_percent")))


def _cache(reader: Reader, cache: Any) -> ModelCache:
    if not isinstance(cache, dict):
        raise reader.refused("has caches that are none")
    one = Reader(reader.source, cache)
    tokens = [second for round_ in cache.get("step_s") or () for second in one.times(round_, "step_s")]
    if cache.get("decode_s") is not None:  # a sample is of several tokens
        tokens = [second / reader.count("tokens") for second in one.times(cache["decode_s"], "decode_s")]
    figures = {
        name: optional_number(one, key)
        for name, key in (
            ("tokens_per_s", "tokens_per_s"), ("of_floor", "of_floor"), ("read_ratio", "read_ratio"),
            ("stored_ratio", "stored_ratio"), ("held_ratio", "held_ratio"), ("read_bytes", "kv_read_bytes_per_step"),
            ("stored_bytes", "kv_stored_bytes"), ("held_bytes", "held_bytes"), ("peak_bytes", "peak_bytes"),
            ("first_token_s", "first_token_s"), ("bytes_per_token", "kv_bytes_per_token"),
        )
    }  # fmt: skip
    return ModelCache(
        name=one.text("cache"),
        step_ms=estimate(one, "step_ms"),
        price=_price(one) or (_price(reader) if cache.get("cache") == "elastic" else None),
        token_ms=tuple(1e3 * second for second in tokens),
        **figures,
    )


def is_evaluation(document: Document) -> bool:
    """Whether it is a result of `eval`."""
    return isinstance(document.value, dict) and document.value.get("kind") == EVALUATION


def evaluation_of(document: Document) -> Evaluation:
    """Return what a model's predictions lost.

    Raises
    ------
    UsageError : naming the file, if it is of another version or lacks something.
    """
    reader = Reader(document.source, document.value)
    if reader.at("version") != EVALUATION_VERSION:
        raise UsageError(
            f"{document.source} is of version {reader.at('version')}, and this program reads {EVALUATION_VERSION}: "
            "update elastickv, or measure again"
        )
    model = reader.text("model", "name")
    device = reader.optional("model", "device_name") or reader.optional("environment", "cpu") or reader.text("model", "device")
    calibration = reader.optional("calibration")
    skipped = [f"left out: {reason}" for reason in lines(reader, "skipped")]
    needles = [_needles(reader, row) for row in reader.at("needle", kind=list)]
    skipped += [f"left out: {reason}" for row in reader.at("needle") for reason in row.get("skipped", [])]
    if calibration is None:
        skipped.append("not calibrated: every head reads the same share of its pages")
    return Evaluation(
        provenance=provenance(reader, str(device), [*lines(reader, "warnings"), *skipped]),
        model=model,
        dtype=reader.text("model", "dtype"),
        texts=lines(reader, "texts"),
        calibration="" if calibration is None else f"{reader.at('calibration', 'tokens')} tokens of {calibration.get('text')}",
        losses=tuple(_loss(reader, row) for row in reader.at("rows", kind=list)),
        needles=tuple(needle for found in needles for needle in found),
        suggestion=_suggestion(reader),
    )


def _loss(reader: Reader, row: Any) -> Loss:
    if not isinstance(row, dict):
        raise reader.refused("has rows that are none")
    one = Reader(reader.source, row)
    greedy = one.optional("greedy")
    leaves = ""
    if greedy is not None:
        leaves = f"{one.number('greedy', 'mean_first_different'):.0f} of {one.count('greedy', 'tokens')}"
    recipes = list(dict.fromkeys(lines(one, "recipes")))
    named = recipes[0] if len(recipes) == 1 else f"{len(recipes)} recipes" if recipes else one.optional("quantiser")
    return Loss(
        context=one.count("context"),
        cache=one.text("cache"),
        recipe=" ".join(str(part) for part in (named, one.optional("recipe_hash")) if part),
        read=optional_number(one, "read_ratio"),
        stored=optional_number(one, "stored_ratio"),
        ppl_percent=_mean(one, "ppl_change_percent"),
        kl=_mean(one, "kl"),
        top1_percent=_mean(one, "top1_percent"),
        greedy=leaves,
    )


def _mean(reader: Reader, name: str) -> IntervalEstimate:
    """Return a mean with its interval; unlike times it may be negative."""
    found = [reader.at(name, key) for key in ("mean", "low", "high")]
    if not all(type(value) in (int, float) and abs(value) < float("inf") for value in found):
        raise reader.refused(f"has no figure in {name}")
    return IntervalEstimate(*map(float, found))


def _needles(reader: Reader, row: Any) -> list[Needle]:
    if not isinstance(row, dict):
        raise reader.refused("has needles that are none")
    one = Reader(reader.source, row)
    depths = [float(depth) for depth in one.at("depths", kind=list)]
    found = []
    for cache, hits in one.at("found", kind=dict).items():
        if not isinstance(hits, list) or len(hits) != len(depths):
            raise reader.refused(f"has another number of pass keys than depths for {cache}")
        counts: dict[float, tuple[int, int]] = {}
        for depth, hit in zip(depths, hits, strict=True):
            there, tried = counts.get(depth, (0, 0))
            counts[depth] = there + bool(hit), tried + 1
        found.append(Needle(one.count("tokens"), str(cache), counts))
    return found


def _suggestion(reader: Reader) -> str:
    if reader.optional("suggestion") is None:
        return ""
    tolerance, compress = reader.at("suggestion", "tolerance"), reader.at("suggestion", "compress")
    if compress is None:
        return f"No C that was measured is within {tolerance}."
    unsure = "" if reader.at("suggestion", "certain") else " (its interval is not: measure more windows)"
    return f"Largest C within {tolerance}: {compress:g}{unsure}."
