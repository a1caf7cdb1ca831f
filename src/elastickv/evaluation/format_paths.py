"""Decoding with KV formats: the published ones as references, our own through the cache that `generate` uses.

Our own are named, or those that a calibration chooses for each layer within a budget of stored bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from elastickv.errors import UsageError
from elastickv.evaluation import sessions
from elastickv.evaluation.exact_tokens import ExactTokens
from elastickv.evaluation.kv_formats.published_formats import format_of
from elastickv.evaluation.kv_formats.reference_format import ReferenceFormat
from elastickv.evaluation.recipes_by_ratio import Span, measured
from elastickv.evaluation.subject import DecodePath, Subject
from elastickv.recipe import LayerPlan, ModelCalibration, Recipe, for_stored_bits, stored_bits, stored_bytes
from elastickv.recipe.formats import DENSE_BYTES_PER_ELEMENT, PAGE_TOKENS, unread_formats
from elastickv.recipe.layer_solver import check_stored_bits
from elastickv.recipe.regions import regions
from elastickv.transformers.model_support import text_config

_MANY_TOKENS = 1 << 20  # so many that all regions of a recipe are full


@dataclass(frozen=True)
class _CountedBytes:
    """What a format stores: bits of a quantized element, and bytes of one sequence at the end of a span."""

    bits_per_element: float
    bytes_stored: int


def refused_formats(subject: Subject, names: Sequence[str]) -> dict[str, str]:
    """Return those of `names` that no kernel of the model's device reads, each with the reason.

    Raises
    ------
    UsageError : if there are names, and all of them are such.
    """
    unread, refused = unread_formats(subject.device), dict[str, str]()
    for name in names:
        recipe = format_of(name)
        of_recipe = () if isinstance(recipe, ReferenceFormat) else (recipe.key_format, recipe.value_format)
        for missing in set(of_recipe) & set(unread):
            refused[name] = f"{name} is not measured: format {missing} has no {(subject.device or 'CUDA').upper()} kernel"
    if refused and len(refused) == len(names):
        raise UsageError(f"{'; '.join(refused.values())}: give other formats, or the cpu as device")
    return refused


def format_paths(subject: Subject, names: Sequence[str], exact: ExactTokens | None, span: Span) -> list[DecodePath]:
    """Return a path for each format but those that `refused_formats` names.

    Parameters
    ----------
    names : as `parse_formats` returns them.
    exact : sinks and window of all formats; None for each format's own.
    span : the decode steps; bytes are those at its end.

    Raises
    ------
    UsageError : if a format does not fit the model's heads.
    """
    refused = refused_formats(subject, names)
    return [_path(subject, name, exact, span) for name in names if name not in refused]


def check_budgets(budgets: Sequence[float], calibration: ModelCalibration | None, model: str) -> None:
    """Check that budgets of stored bits are numbers of bits, and that there is a calibration to choose formats by.

    Raises
    ------
    UsageError : naming what is missing.
    """
    for bits in budgets:
        check_stored_bits(bits)
    if budgets and calibration is None:
        raise UsageError(
            f"`stored_bits`={budgets[0]:g} needs a calibration, which says what each layer loses in each format: run "
            f"`elastickv calibrate {model} -o FILE` and give `calibration` FILE"
        )


def unmet_budgets(subject: Subject, budgets: Sequence[float]) -> list[str]:
    """Return, for budgets of stored bits an element that are too small for the formats of the model's device, why they are.

    Raises
    ------
    UsageError : if there are budgets and all are too small, or as `check_budgets`.
    """
    check_budgets(budgets, subject.calibration, subject.loaded.name)
    reasons = []
    for bits in budgets:
        try:
            _within(subject, bits)
        except UsageError as error:
            reasons.append(str(error))
    if reasons and len(reasons) == len(budgets):
        raise UsageError(reasons[-1])
    return reasons


def stored_bits_paths(subject: Subject, budgets: Sequence[float], span: Span) -> list[DecodePath]:
    """Return a path for each budget of stored bits an element but those that `unmet_budgets` names.

    Parameters
    ----------
    span : the decode steps; bytes are those at its end.
    """
    paths = []
    for bits in budgets:
        try:
            chosen = _within(subject, bits)
        except UsageError:
            continue
        paths.append(_calibrated(subject, f"stored_bits={bits:g}", chosen, span))
    return paths


def _within(subject: Subject, bits: float) -> LayerPlan:
    """Return the recipes of least calibrated error that take at most `bits` an element."""
    calibration = subject.calibration
    assert calibration is not None
    if calibration.layers != tuple(subject.elastic):
        raise UsageError("the calibration has other layers than the model: calibrate it again")
    return for_stored_bits(calibration, bits, subject.dtype, device=subject.device)


def _calibrated(subject: Subject, name: str, chosen: LayerPlan, span: Span) -> DecodePath:
    end = span.first + span.steps
    plan = measured(1.0, chosen.recipes, span, subject.shape, subject.dtype)
    bits = sum(stored_bits(recipe, subject.head_dim) for recipe in chosen.recipes) / len(chosen.recipes)
    exact = {regions(end, recipe.sinks, recipe.window).exact for recipe in chosen.recipes}.pop()
    described = {"sinks": chosen.recipes[0].sinks, "exact_keys": exact, "exact_values": exact, "source": "formats by layer"}
    figures = _figures(subject, _CountedBytes(bits, plan.stored_bytes), end, described)
    figures |= {"recipe_hash": plan.hash, "recipes": [str(recipe) for recipe in plan.recipes], "read_ratio": plan.read_ratio}
    figures |= {"step_bytes_read": plan.step_bytes, "expected_error": chosen.error}
    return DecodePath(name, subject.decoding(plan.recipes), figures)


def _path(subject: Subject, name: str, exact: ExactTokens | None, span: Span) -> DecodePath:
    stored_as = format_of(name)
    if isinstance(stored_as, ReferenceFormat):
        return _published(subject, stored_as if exact is None else stored_as.with_exact(exact), span)
    recipe = stored_as if exact is None else replace(stored_as, sinks=exact.sinks, window=exact.window)
    return _own(subject, name, recipe, span)


def _published(subject: Subject, stored_as: ReferenceFormat, span: Span) -> DecodePath:
    stored_as.check_head(subject.head_dim)
    end = span.first + span.steps
    exact_layers = stored_as.exact_layers(int(text_config(subject.model).num_hidden_layers)) & set(subject.elastic)
    counted = _CountedBytes(
        stored_as.bits_per_element(subject.head_dim),
        stored_as.stored_bytes(end, subject.head_dim, subject.shape.kv_heads, subject.layers, len(exact_layers)),
    )
    keys, values = (end - plane.stored_tokens(end, stored_as.sinks) for plane in (stored_as.keys, stored_as.values))
    exact = {"sinks": stored_as.sinks, "exact_keys": keys, "exact_values": values}
    figures = _figures(subject, counted, end, exact | {"source": stored_as.source})
    decoding = lambda start, _: sessions.published(subject.model, stored_as, start)  # noqa: E731
    return DecodePath(stored_as.name, decoding, figures)


def _own(subject: Subject, name: str, recipe: Recipe, span: Span) -> DecodePath:
    recipe.check_shape(subject.shape.head_dim, subject.shape.kv_heads)
    end = span.first + span.steps
    plan = measured(1.0, (recipe,) * subject.layers, span, subject.shape, subject.dtype)
    held = partial(stored_bytes, recipe, shape=subject.shape, model_dtype=subject.dtype)
    page = held([_MANY_TOKENS + PAGE_TOKENS]) - held([_MANY_TOKENS])
    counted = _CountedBytes(8 * page / (2 * PAGE_TOKENS * subject.shape.kv_heads * subject.head_dim), plan.stored_bytes)
    exact = dict.fromkeys(("exact_keys", "exact_values"), regions(end, recipe.sinks, recipe.window).exact)
    figures = _figures(subject, counted, end, exact | {"sinks": recipe.sinks, "source": "recipe"})
    figures |= {"recipe_hash": recipe.hash, "recipes": [str(recipe)], "read_ratio": plan.read_ratio}
    figures |= {"step_bytes_read": plan.step_bytes, "expected_error": None}
    return DecodePath(name, subject.decoding(plan.recipes), figures)


def _figures(subject: Subject, counted: _CountedBytes, tokens: int, described: dict[str, Any]) -> dict[str, Any]:
    elements = 2 * tokens * subject.layers * subject.shape.kv_heads * subject.head_dim
    return {
        "compress": None,
        "stored_ratio": elements * DENSE_BYTES_PER_ELEMENT / counted.bytes_stored,
        "bytes_stored": counted.bytes_stored,
        "stored_format": {
            "bits_per_element": counted.bits_per_element,
            "stored_bits_per_element": 8 * counted.bytes_stored / elements,
            **described,
        },
    }
