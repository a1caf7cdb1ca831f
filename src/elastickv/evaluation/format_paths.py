"""Decoding with KV formats: published ones as references, our own through the cache that `generate` uses or as references.

Our own are named, or those that a calibration chooses for each layer within a budget of stored bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from elastickv.errors import UsageError
from elastickv.evaluation import sessions
from elastickv.evaluation.evaluation_options import REFERENCE
from elastickv.evaluation.exact_tokens import ExactTokens
from elastickv.evaluation.kv_formats.own_formats import own_format
from elastickv.evaluation.kv_formats.published_formats import format_of
from elastickv.evaluation.kv_formats.reference_format import ReferenceFormat
from elastickv.evaluation.recipes_by_ratio import Span, measured
from elastickv.evaluation.subject import DecodePath, Subject
from elastickv.kvcache.gptq import layer_compensation, no_hessians
from elastickv.recipe import AttentionShape, LayerPlan, ModelCalibration, Recipe, for_stored_bits, stored_bytes
from elastickv.recipe.calibration import StorageStatistics
from elastickv.recipe.formats import DENSE_BYTES_PER_ELEMENT, PAGE_TOKENS, sixteen_bit, unread_formats
from elastickv.recipe.layer_solver import check_stored_bits
from elastickv.recipe.recipe import DEFAULT_SINKS, DEFAULT_WINDOW
from elastickv.recipe.regions import regions
from elastickv.transformers.model_support import text_config

_OF_REFERENCES = "cpu"  # whose kernels read all formats, and whose caches round by Hessians
_MANY_TOKENS = 1 << 20  # so many that all regions of a recipe are full


class AttentionSizes(Protocol):
    """The layers with full attention of a model, whose bytes are counted."""

    @property
    def shape(self) -> AttentionShape:
        """Of one sequence of a layer, as it is stored."""

    @property
    def layers(self) -> int:
        """Number of the layers."""

    @property
    def head_dim(self) -> int:
        """Channels of a head."""


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
        named = format_of(name)
        recipes = () if isinstance(named, ReferenceFormat) else named.all
        by_hessians = [recipe for recipe in recipes if recipe.uses_hessians]
        if by_hessians and (subject.calibration is None or subject.calibration.hessians is None):
            refused[name] = f"{name} is not measured: {no_hessians(by_hessians[0])}"
        if name.startswith(REFERENCE):
            continue
        kernel = f"{(subject.device or 'CUDA').upper()} kernel"
        missing = {fmt for recipe in recipes for fmt in (recipe.key_format, recipe.value_format)} & set(unread)
        lacking = [f"format {fmt}" for fmt in sorted(map(str, missing))]
        lacking += [f"rounding={by_hessians[0].rounding}"] if by_hessians and subject.device != "cpu" else []
        have = "has" if len(lacking) == 1 else "have"
        if lacking:
            refused[name] = f"{name} is not measured: {' and '.join(lacking)} {have} no {kernel}, {REFERENCE}{name} needs none"
    if refused and len(refused) == len(names):
        elsewhere = "" if subject.device == "cpu" else ", or the cpu as device"
        raise UsageError(f"{'; '.join(refused.values())}: give other formats{elsewhere}")
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
    reasons = [_within(subject, bits, subject.device) for bits in budgets]
    if budgets and all(isinstance(_within(subject, bits, _OF_REFERENCES), str) for bits in budgets):
        raise UsageError(next(reason for reason in reversed(reasons) if isinstance(reason, str)))
    return [reason for reason in reasons if isinstance(reason, str)]


def stored_bits_paths(subject: Subject, budgets: Sequence[float], exact: ExactTokens | None, span: Span) -> list[DecodePath]:
    """Return two paths for each budget of stored bits an element: through the cache, and as a reference.

    The cache has formats that the model's device reads, and is missing for a budget that `unmet_budgets` names. The reference
    has those of the CPU, which reads them all, on any device.

    Parameters
    ----------
    exact : sinks and window of all recipes; None for the defaults.
    span : the decode steps; bytes are those at its end.
    """
    paths = []
    for bits in budgets:
        name = f"stored_bits={bits:g}"
        through_cache, as_reference = (_within(subject, bits, device, exact) for device in (subject.device, _OF_REFERENCES))
        if isinstance(through_cache, LayerPlan):
            paths.append(_own(subject, name, through_cache.recipes, span, through_cache.error))
        if isinstance(as_reference, LayerPlan):
            paths.append(reference_path(subject, f"{REFERENCE}{name}", as_reference.recipes, span, as_reference.error))
    return paths


def _within(subject: Subject, bits: float, device: str | None, exact: ExactTokens | None = None) -> LayerPlan | str:
    """Return the recipes of least calibrated error that take at most `bits` an element, or why a device reads none."""
    calibration = subject.calibration
    assert calibration is not None
    if calibration.layers != tuple(subject.elastic):
        raise UsageError("the calibration has other layers than the model: calibrate it again")
    try:
        sinks, window = (DEFAULT_SINKS, DEFAULT_WINDOW) if exact is None else (exact.sinks, exact.window)
        return for_stored_bits(calibration, bits, subject.dtype, sinks, window, device, gptq=device == "cpu")
    except UsageError as error:
        return str(error)


def _path(subject: Subject, name: str, exact: ExactTokens | None, span: Span) -> DecodePath:
    stored_as = format_of(name)
    if isinstance(stored_as, ReferenceFormat):
        return _published(subject, stored_as if exact is None else stored_as.with_exact(exact), span)
    recipes = stored_as.by_layer(name, subject.elastic)
    if exact is not None:
        recipes = tuple(each if each.is_dense else replace(each, sinks=exact.sinks, window=exact.window) for each in recipes)
    return reference_path(subject, name, recipes, span) if name.startswith(REFERENCE) else _own(subject, name, recipes, span)


def reference_path(
    subject: Subject, name: str, recipes: Sequence[Recipe], span: Span, error: float | None = None
) -> DecodePath:
    """Return the path of recipes as references, on any device, with the smoothing and the Hessians of the calibration.

    Parameters
    ----------
    name : of the row: `reference:` and what stands for the recipes.
    recipes : one for each layer with full attention; they read all tokens.
    error : that the solver expects.

    Raises
    ------
    UsageError : if a recipe selects tokens or does not fit the model's heads, or their number is not that of the layers.
    """
    if len(recipes) != subject.layers:
        raise UsageError(f"format {name} has {len(recipes)} recipes, and the model {subject.layers} layers: give one for each")
    if not name.startswith(REFERENCE):
        raise UsageError(f"format {name} would be taken for one with kernels: begin its name with {REFERENCE}")
    formats = dict[int, ReferenceFormat]()
    for layer, recipe in zip(subject.elastic, recipes, strict=True):
        recipe.check_shape(subject.shape.head_dim, subject.shape.kv_heads)
        known = StorageStatistics() if subject.calibration is None else subject.calibration.statistics_of(layer)
        compensation = layer_compensation(recipe, subject.shape.head_dim, known)
        stored_as = own_format(recipe, subject.shape.head_dim, subject.dtype, known.smoothing, compensation)
        if stored_as is not None:
            formats[layer] = stored_as
    decoding = lambda start, _: sessions.by_layer(subject.model, formats, start)  # noqa: E731
    figures = format_figures(subject, recipes, span, sixteen_bit(subject.dtype), subject.dtype, error)
    return DecodePath(name, decoding, figures)


def _published(subject: Subject, stored_as: ReferenceFormat, span: Span) -> DecodePath:
    stored_as.check_head(subject.head_dim)
    end = span.first + span.steps
    exact_layers = stored_as.exact_layers(int(text_config(subject.model).num_hidden_layers)) & set(subject.elastic)
    counted = _CountedBytes(
        stored_as.bits_per_element(subject.head_dim),
        stored_as.stored_bytes(end, subject.head_dim, subject.shape.kv_heads, subject.layers, len(exact_layers)),
    )
    keys, values = (end - plane.stored_tokens(end, stored_as.sinks) for plane in (stored_as.keys, stored_as.values))
    exact = {"sinks": stored_as.sinks, "exact_keys": keys, "exact_values": values, "exact_dtype": subject.dtype}
    figures = _figures(subject, counted, end, exact | {"source": stored_as.source})
    decoding = lambda start, _: sessions.published(subject.model, stored_as, start)  # noqa: E731
    return DecodePath(stored_as.name, decoding, figures)


def _own(subject: Subject, name: str, recipes: Sequence[Recipe], span: Span, error: float | None = None) -> DecodePath:
    for recipe in set(recipes):
        recipe.check_shape(subject.shape.head_dim, subject.shape.kv_heads)
    exact_dtypes = sorted({recipe.exact_dtype(subject.dtype) for recipe in recipes})
    figures = format_figures(subject, recipes, span, subject.dtype, " and ".join(exact_dtypes), error)
    return DecodePath(name, subject.decoding(recipes), figures)


def format_figures(
    model: AttentionSizes,
    recipes: Sequence[Recipe],
    span: Span,
    dtype: str,
    exact_dtype: str,
    error: float | None = None,
) -> dict[str, Any]:
    """Return what a row says of recipes as formats, one for each layer.

    Parameters
    ----------
    dtype : of which the model counts as in their bytes.
    exact_dtype : to which everything is rounded before it is quantized.
    error : that the solver expects; None for recipes that were named.
    """
    end = span.first + span.steps
    plan = measured(1.0, recipes, span, model.shape, dtype)
    bits = {recipe: _quantized_bits(model, recipe, dtype) for recipe in set(recipes)}
    counted = _CountedBytes(sum(bits[recipe] for recipe in recipes) / len(recipes), plan.stored_bytes)
    most_exact = max(end if recipe.is_dense else regions(end, recipe.sinks, recipe.window).exact for recipe in recipes)
    exact = dict.fromkeys(("exact_keys", "exact_values"), most_exact)
    exact |= {"sinks": max(recipe.sinks for recipe in recipes)}
    figures = _figures(model, counted, end, exact | {"exact_dtype": exact_dtype, "source": "recipe"})
    named = recipes if len(bits) > 1 else recipes[:1]
    figures |= {"recipe_hash": plan.hash, "recipes": [*map(str, named)], "read_ratio": plan.read_ratio}
    figures |= {"step_bytes_read": plan.step_bytes, "expected_error": error}
    return figures


def _quantized_bits(model: AttentionSizes, recipe: Recipe, dtype: str) -> float:
    """Return the bits of a cold element with its scales: those of a page that is added to many."""
    held = partial(stored_bytes, recipe, shape=model.shape, model_dtype=dtype)
    page = held([_MANY_TOKENS + PAGE_TOKENS]) - held([_MANY_TOKENS])
    return 8 * page / (2 * PAGE_TOKENS * model.shape.kv_heads * model.head_dim)


def _figures(model: AttentionSizes, counted: _CountedBytes, tokens: int, described: dict[str, Any]) -> dict[str, Any]:
    elements = 2 * tokens * model.layers * model.shape.kv_heads * model.head_dim
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
