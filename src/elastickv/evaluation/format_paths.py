"""Decoding with KV formats: the published ones as references, our own through the cache that `generate` uses."""

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
from elastickv.kvcache.gptq import no_hessians
from elastickv.recipe import Recipe, stored_bytes
from elastickv.recipe.formats import DENSE_BYTES_PER_ELEMENT, PAGE_TOKENS, unread_formats
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
        if isinstance(recipe, Recipe) and recipe.uses_hessians:
            if subject.device != "cpu":
                refused[name] = f"{name} is not measured: rounding={recipe.rounding} has no CUDA kernel"
            elif subject.calibration is None or subject.calibration.hessians is None:
                refused[name] = str(no_hessians(recipe))
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
