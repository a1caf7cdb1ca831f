"""The recipes that meet a ratio, and the bytes that they read and store over the scored steps."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from elastickv.errors import UsageError
from elastickv.kvcache.key_scales import unsuited_loss
from elastickv.recipe import (
    AttentionShape,
    ModelCalibration,
    Recipe,
    dense_bytes,
    for_ratio,
    for_ratio_by_layer,
    step_bytes,
    stored_bytes,
)
from elastickv.recipe.solver import PER_CHANNEL, YARDSTICK

_TRIES = 8
_MARGIN = 0.0003


@dataclass(frozen=True)
class Span:
    """The decode steps over which bytes are summed: from `first` tokens in the cache, `steps` tokens more."""

    first: int
    steps: int


@dataclass(frozen=True)
class RatioRecipes:
    """Recipes of a model's layers at a ratio.

    Attributes
    ----------
    ratio : C as requested.
    recipes : one for each layer.
    read_ratio : dense bytes / bytes read, summed over the span.
    stored_ratio : dense bytes / bytes stored at the span's end.
    step_bytes : bytes read by one sequence in one step, all layers, mean over the span.
    stored_bytes : bytes held of one sequence, all layers, at the span's end.
    expected_error : the error that the solver expects; None without a calibration.
    by_keys : indices of the recipes that a prompt's keys decided.
    """

    ratio: float
    recipes: tuple[Recipe, ...]
    read_ratio: float
    stored_ratio: float
    step_bytes: float
    stored_bytes: int
    expected_error: float | None
    by_keys: tuple[int, ...] = ()

    @property
    def hash(self) -> str:
        """The recipe's hash; where layers differ, 12 hex digits of the SHA-256 of their hashes in order."""
        hashes = [recipe.hash for recipe in self.recipes]
        if len(set(hashes)) == 1:
            return hashes[0]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:12]


def plan(
    ratio: float,
    span: Span,
    shape: AttentionShape,
    layers: int,
    dtype: str,
    calibration: ModelCalibration | None,
    device: str | None = None,
    keys: Sequence[NDArray[np.float32]] | None = None,
) -> RatioRecipes:
    """Return recipes that read at most 1/ratio of the dense bytes, summed over a span.

    Parameters
    ----------
    shape : of one sequence of one layer.
    calibration : of the model; without one every layer has the same recipe with one fraction for all heads.
    device : where the recipes are decoded, as for `for_ratio_by_layer`.
    keys : for each layer a (kv_heads, tokens, head_dim) sample of a prompt's keys, in whole pages. Without a calibration,
        layers to whose keys a scale for each token or page is not suited get scales of channels, as in `ElasticCache`.

    Raises
    ------
    UsageError : if no recipe meets the ratio there.
    """
    if calibration is not None and len(calibration.layers) != layers:
        raise UsageError(f"the calibration has {len(calibration.layers)} layers and the model {layers}: calibrate it again")
    middle, target = span.first + span.steps // 2, ratio
    for attempt in range(_TRIES):
        error, by_keys = None, tuple[int, ...]()
        if calibration is not None:
            solved = for_ratio_by_layer(calibration, target, middle, dtype, device=device, gptq=device == "cpu")
            recipes, error = solved.recipes, solved.error
        else:
            recipes, by_keys = _uncalibrated(target, middle, shape, dtype, layers, keys)
        candidate = replace(measured(ratio, recipes, span, shape, dtype, error), by_keys=by_keys)
        if candidate.read_ratio >= ratio or ratio == 1:
            return candidate
        # By what it lacks, and a little more at each attempt: bytes change by whole pages.
        target = min(target * ratio / candidate.read_ratio * (1 + _MARGIN * 2**attempt), target + 1)
    raise UsageError(
        f"compress={ratio:g} cannot be met over tokens {span.first} to {span.first + span.steps}: give a smaller one"
    )


def _uncalibrated(
    ratio: float,
    context: int,
    shape: AttentionShape,
    dtype: str,
    layers: int,
    keys: Sequence[NDArray[np.float32]] | None,
) -> tuple[tuple[Recipe, ...], tuple[int, ...]]:
    """Return a recipe for each layer, and the indices of those that the keys decided."""
    recipes = [for_ratio(ratio, context, shape, dtype)] * layers
    key_format = recipes[0].key_format
    if keys is None or key_format is None:
        return tuple(recipes), ()
    unsuited = tuple(n for n, of_layer in enumerate(keys) if unsuited_loss(of_layer, key_format, YARDSTICK) is not None)
    for n in unsuited:
        recipes[n] = for_ratio(ratio, context, shape, dtype, key_formats=PER_CHANNEL)
    return tuple(recipes), unsuited


def measured(
    ratio: float, recipes: Sequence[Recipe], span: Span, shape: AttentionShape, dtype: str, error: float | None = None
) -> RatioRecipes:
    """Return recipes with their bytes, summed step by step as the decode path runs."""
    cost: dict[Recipe, float] = {}
    held: dict[Recipe, int] = {}
    end = span.first + span.steps
    for recipe in set(recipes):
        steps = (
            step_bytes(recipe, [span.first + s + 1], shape, dtype, recipe.steps_since_refresh(s)).kv for s in range(span.steps)
        )
        cost[recipe] = sum(steps)
        held[recipe] = stored_bytes(recipe, [end], shape, dtype)
    dense = sum(dense_bytes([span.first + s + 1], shape) for s in range(span.steps))
    read, stored = sum(cost[recipe] for recipe in recipes), sum(held[recipe] for recipe in recipes)
    # A dense cache has the model's own dtype; the dense bytes count 2 bytes for each element.
    plain = all(recipe.is_dense for recipe in recipes)
    return RatioRecipes(
        ratio=ratio,
        recipes=tuple(recipes),
        read_ratio=1.0 if plain else len(recipes) * dense / read,
        stored_ratio=1.0 if plain else len(recipes) * dense_bytes([end], shape) / stored,
        step_bytes=read / span.steps,
        stored_bytes=stored,
        expected_error=error,
    )
