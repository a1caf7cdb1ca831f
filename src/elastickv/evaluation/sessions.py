"""Decoding after a shared prefill, a token a row and step: ElasticCache, published formats and selections, stock caches."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Protocol

import torch
import transformers
from transformers.cache_utils import DynamicLayer

from elastickv.errors import UsageError
from elastickv.evaluation.kv_formats.format_layer import FormatLayer, SixteenBitLayer
from elastickv.evaluation.kv_formats.reference_format import ReferenceFormat
from elastickv.evaluation.kv_selections.recipe_pages import RecipePages
from elastickv.evaluation.kv_selections.reference_selection import SelectionPlan
from elastickv.evaluation.kv_selections.selected_layer import SelectedLayer
from elastickv.evaluation.prefill import Prefill, Tensor, has_attention_everywhere
from elastickv.recipe import ModelCalibration, Recipe
from elastickv.transformers.attention import IMPLEMENTATION
from elastickv.transformers.cache import ElasticCache
from elastickv.transformers.cache_argument import CACHE_ARGUMENT
from elastickv.transformers.layer import ElasticLayer
from elastickv.transformers.model_support import stock_layers, text_config

QUANTIZED_BITS = {"quanto": 4, "hqq": 4, "fp8": 8}
_PACKAGES = {"quanto": "optimum.quanto", "hqq": "hqq"}


class DecodingSession(Protocol):
    """Rows that grow by one token at each step.

    Attributes
    ----------
    takes_several : whether `read` takes several tokens a row.
    """

    takes_several: bool

    def step(self, ids: Tensor) -> Tensor:
        """Feed one (rows,) token id to every row; return the (rows, vocabulary) float32 logits that follow."""

    def read(self, ids: Tensor) -> Tensor:
        """Feed (rows, tokens) ids, each token as a step would read it; return (rows, tokens, vocabulary) float32 logits."""


class _SteppedModel:
    def __init__(self, model: Any, cache: Any, takes_several: bool = False) -> None:
        self._model, self._cache = model, cache
        self.takes_several = takes_several

    def step(self, ids: Tensor) -> Tensor:
        return self.read(ids[:, None])[:, -1]

    def read(self, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            inputs = ids.to(self._model.device)
            return self._model(input_ids=inputs, use_cache=True, **{CACHE_ARGUMENT: self._cache}).logits.float()


@contextmanager
def elastic(
    model: Any, recipes: Sequence[Recipe], start: Prefill, tokens: int, calibration: ModelCalibration | None = None
) -> Iterator[DecodingSession]:
    """Decode `tokens` tokens with an ElasticCache of one recipe for each layer with full attention; restore the model on exit.

    Rotated keys are smoothed, and codes chosen by Hessians, as the calibration says.

    These layers start in the state in which `prefill="exact"` leaves them before a prompt's last token: they hold exact keys
    and values, which the first step stores.
    """
    used = calibration if any(recipe.rotates_keys or recipe.uses_hessians for recipe in recipes) else None
    capacity = start.tokens + tokens
    cache = ElasticCache.for_model(model, recipe=list(recipes), calibration=used, capacity=capacity, prefill="exact")
    start.fill(cache.layers, _hold)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        yield _SteppedModel(model, cache)
    finally:
        model.set_attn_implementation(before)


@contextmanager
def stock(model: Any, start: Prefill) -> Iterator[DecodingSession]:
    """Decode with Transformers' default cache."""
    cache = transformers.DynamicCache(config=model.config)
    start.fill(cache.layers, _update)
    yield _SteppedModel(model, cache)


@contextmanager
def published(model: Any, stored_as: ReferenceFormat, start: Prefill) -> Iterator[DecodingSession]:
    """Decode with a published KV format in the layers with full attention; the others keep Transformers' own.

    The model is restored on exit.
    """
    layers = stock_layers(text_config(model))
    exact = stored_as.exact_layers(len(layers))
    full = [number for number, layer in enumerate(layers) if type(layer) is DynamicLayer and number not in exact]
    with by_layer(model, dict.fromkeys(full, stored_as), start) as session:
        yield session


@contextmanager
def by_layer(model: Any, formats: Mapping[int, ReferenceFormat], start: Prefill) -> Iterator[DecodingSession]:
    """Decode with a KV format for each layer that has one; the others keep Transformers' own. Restore the model on exit.

    Parameters
    ----------
    formats : number of a layer with full attention -> its format.
    """
    cache = transformers.DynamicCache(config=model.config)
    for number, stored_as in formats.items():
        cache.layers[number] = FormatLayer(stored_as, number)
    start.fill(cache.layers, _update)
    with _attending_layers(model) as takes_several:
        yield _SteppedModel(model, cache, takes_several)


@contextmanager
def selected(model: Any, chosen: SelectionPlan, scores: Mapping[int, Tensor], start: Prefill) -> Iterator[DecodingSession]:
    """Decode with a published selection in the layers with full attention; restore the model on exit.

    Parameters
    ----------
    scores : layer -> (rows, kv_heads, tokens) scores of the prompts' tokens, where the selection needs them.
    """
    cache = transformers.DynamicCache(config=model.config)
    full = [number for number, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
    for number in full[: chosen.dense_layers]:
        cache.layers[number] = SixteenBitLayer()
    for number in full[chosen.dense_layers :]:
        cache.layers[number] = SelectedLayer(number, chosen.selection.layer(chosen.size, scores.get(number)))
    start.fill(cache.layers, _update)
    with _attending_layers(model) as takes_several:
        yield _SteppedModel(model, cache, takes_several)


@contextmanager
def recipe_pages(
    model: Any, recipes: Sequence[Recipe], start: Prefill, others_in_16_bits: bool = True
) -> Iterator[DecodingSession]:
    """Decode with 16-bit keys and values, of which a step reads the pages that recipes select; restore the model on exit.

    Parameters
    ----------
    recipes : one for each layer with full attention; one that selects no pages reads everything.
    others_in_16_bits : whether layers that read everything are rounded to 16 bits too, or have the model's dtype.
    """
    cache = transformers.DynamicCache(config=model.config)
    full = [number for number, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
    for place, (number, recipe) in enumerate(zip(full, recipes, strict=True)):
        offset = recipe.layer_anchor_offset(place, len(full))
        if recipe.selection == "pages":
            cache.layers[number] = SelectedLayer(number, RecipePages(recipe, offset))
        elif others_in_16_bits:
            cache.layers[number] = SixteenBitLayer()
    start.fill(cache.layers, _update)
    with _attending_layers(model) as takes_several:
        yield _SteppedModel(model, cache, takes_several)


@contextmanager
def _attending_layers(model: Any) -> Iterator[bool]:
    """Let layers of references attend; return whether these may take several tokens: a state is followed one by one."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        yield has_attention_everywhere(model)
    finally:
        model.set_attn_implementation(before)


@contextmanager
def stock_quantized(model: Any, start: Prefill, kind: str | None = None) -> Iterator[DecodingSession]:
    """Decode with Transformers' own quantized cache.

    Raises
    ------
    UsageError : if no quantizer that it can use is installed.
    """
    cache = transformers.QuantizedCache(backend=kind or quantizer(), config=model.config)
    start.fill(cache.layers, _update)
    yield _SteppedModel(model, cache)


def quantizer() -> str:
    """Return the quantizer that Transformers' quantized cache can use here: 4 bits before fp8.

    Raises
    ------
    UsageError : if there is none.
    """
    for kind, package in _PACKAGES.items():
        if find_spec(package.partition(".")[0]) is not None and find_spec(package) is not None:
            return kind
    if hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
        return "fp8"
    raise UsageError("`reference=stock-quantized` needs a quantizer: pip install optimum-quanto")


def check_quantizable(model: Any) -> None:
    """Refuse a model that Transformers' quantized cache cannot serve.

    Raises
    ------
    UsageError : if a layer does not attend to the whole context, or no quantizer is installed.
    """
    quantizer()
    if any(type(layer) is not DynamicLayer for layer in stock_layers(text_config(model))):
        raise UsageError(
            f"`reference=stock-quantized`: Transformers' quantized cache serves models with full attention in every layer, and "
            f"{type(model).__name__} has others: leave `reference` out"
        )


def _hold(layer: Any, keys: Tensor, values: Tensor) -> None:
    """Put exact keys and values into a layer of an ElasticCache; Transformers' own layers cut them to their window."""
    if isinstance(layer, ElasticLayer):
        layer.hold(keys, values)
    else:
        _update(layer, keys, values)


def _update(layer: Any, keys: Tensor, values: Tensor) -> None:
    with torch.inference_mode():
        layer.update(keys, values)
