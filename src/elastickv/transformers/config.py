"""The arguments of a cache, and the recipes that follow from them once the prompt is known."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickv.errors import UsageError
from elastickv.inputs import file_exists, file_path, parse_json, read_text
from elastickv.kvcache.gptq import no_hessians
from elastickv.kvcache.key_scales import has_shared_scale, unsuited_loss
from elastickv.recipe import DENSE, AttentionShape, Recipe, for_ratio, predicted_loss, resolve
from elastickv.recipe.calibration import FORMAT as CALIBRATION_FORMAT
from elastickv.recipe.calibration import ModelCalibration, StorageStatistics
from elastickv.recipe.layer_solver import LayerPlan, check_stored_bits, for_ratio_by_layer, for_stored_bits
from elastickv.recipe.shape import MAX_CONTEXT
from elastickv.recipe.solver import PER_CHANNEL, YARDSTICK, check_ratio
from elastickv.transformers.budget import Budget, Reading
from elastickv.transformers.layer_storage import Backends
from elastickv.transformers.model_support import Sizes

USUAL_CONTEXT = 4096
PREFILLS = ("stored", "exact")
RECIPES_FORMAT = "elastickv-recipes"
AUTO = "auto"
RecipeLike = Recipe | str


class UncalibratedWarning(UserWarning):
    """A ratio selects pages without a calibration, so all KV heads get the same share."""


class KeyFormatWarning(UserWarning):
    """Without a calibration, the prompt's keys showed that a scale for each token does not suit them."""


@dataclass
class ElasticConfig:
    """What all layers of a cache share.

    Attributes
    ----------
    sizes : of the model.
    ratio : C, or None where recipes are given.
    recipe : of all layers, or a text that leaves a number open for the ratio to decide. None: the solver's.
    layers : recipes of single layers, which override all else.
    calibration : errors of the model's heads, and what storing its tokens needs to know, or None.
    context : the context at which the ratio must be met. None: from the prompt's length on.
    capacity : tokens that a row may have. None: as many as fit.
    prefill : 'stored': later chunks of a prompt read what is stored; 'exact': 16 bit until the prompt ends.
    device : the kind of device that decodes; None: any, for which only formats that all kernels read are chosen.
    stored_bits : the mean of bits an element that the calibration's formats may take, or None for another budget.
    expected : positions that the running `generate` will fill, prompt included, or None.
    budget : the recipes, once the prompt is known.
    present : what is read at present.
    by_keys : layers whose format of K the prompt's own keys decided.
    backends : where the layers are stored.
    """

    sizes: Sizes
    ratio: float | None
    recipe: RecipeLike | None
    layers: Mapping[int, Recipe]
    calibration: ModelCalibration | None
    context: int | None
    capacity: int | None
    prefill: str
    device: str | None = None
    stored_bits: float | None = None
    expected: int | None = None
    budget: Budget | None = None
    present: Reading | None = None
    by_keys: tuple[int, ...] = ()
    backends: Backends = field(default_factory=Backends)

    def settle(self, longest: int, dtype: str, device: str | None = None) -> Budget:
        """Choose the recipes for a prompt whose longest row has `longest` tokens; `device` is where its keys are."""
        if device != self.device:
            self.device = None  # the model was moved, or is on several
        if self.budget is None:
            # Formats are chosen for the length a conversation may reach; the share of pages follows the context.
            self.budget = self.budget_for(self.context or max(longest, self.usual), dtype)
            self.present = None
        return self.budget

    def judges_keys(self, layer: int) -> bool:
        """Whether the prompt's keys decide the format of K of a layer: where no recipe is given and nothing is calibrated."""
        assert self.budget is not None
        solved = self.ratio is not None and self.recipe in (None, AUTO) and self.calibration is None
        key_format = self.budget.recipes[layer].key_format
        return solved and layer not in self.layers and key_format is not None and has_shared_scale(key_format)

    def suit_keys(self, layer: int, keys: NDArray[np.float32]) -> Budget:
        """Give a layer scales of channels if a scale for each token or page does not suit the keys of its prompt.

        Parameters
        ----------
        keys : (kv_heads, tokens, head_dim), a sample of the prompt's keys in whole pages.
        """
        budget = self.budget
        assert budget is not None
        recipe = budget.recipes[layer]
        losses = unsuited_loss(keys, str(recipe.key_format), YARDSTICK)
        if losses is None or self.ratio is None:
            return budget
        suited = for_ratio(self.ratio, budget.context, budget.shape, budget.dtype, key_formats=PER_CHANNEL)
        if not self.by_keys:
            warnings.warn(
                f"compress={self.ratio:g} without a calibration: the keys of layer {layer} lose {losses[0]:.1%} of their "
                f"variance in {recipe.key_format} and {losses[1]:.1%} in {YARDSTICK} per channel, so that layers of such "
                f"keys get {suited} instead of {recipe}; cache.report() names them; to choose by the errors of outputs: "
                "elastickv calibrate",
                KeyFormatWarning,
                stacklevel=outside("transformers", "torch"),
            )
        self.by_keys = (*self.by_keys, layer)
        self.budget, self.present = replace(budget, recipes=dict(budget.recipes) | {layer: suited}), None
        return self.budget

    @property
    def usual(self) -> int:
        """A typical context, within the model's positions."""
        return min(USUAL_CONTEXT, self.sizes.max_positions or USUAL_CONTEXT)

    def forget(self) -> None:
        """Return to the state before the prompt."""
        self.budget, self.present, self.expected, self.by_keys = None, None, None, ()

    def reading(self, longest: int) -> Reading:
        """Return what is read when the longest row has `longest` tokens."""
        assert self.budget is not None
        if self.present is None or not self.present.since <= longest < self.present.until:
            self.present = self.budget.reading(longest)
        return self.present

    def budget_for(self, context: int, dtype: str) -> Budget:
        """Return the recipes for a context, or for the nearest longer one at which the ratio can be met.

        Raises
        ------
        UsageError : if no context meets the ratio.
        """
        sizes = self.sizes
        group = sizes.query_heads // sizes.kv_heads
        shape = AttentionShape(1, sizes.kv_heads * group, sizes.kv_heads, sizes.stored_head_dim)
        chosen, solved_for = self._solved(context, shape, dtype)
        recipes = dict(zip(sizes.elastic, chosen, strict=True)) | dict(self.layers)
        for recipe in recipes.values():
            recipe.check_shape(shape.head_dim, shape.kv_heads)
        ratio = self.ratio if self.recipe is None else None
        return Budget(recipes, shape, dtype, ratio, solved_for, self.context is not None)

    def _solved(self, context: int, shape: AttentionShape, dtype: str) -> tuple[Sequence[Recipe], int]:
        count = len(self.sizes.elastic)
        if isinstance(self.recipe, Recipe):
            return [self.recipe] * count, context
        if self.stored_bits is not None and self.calibration is not None:
            gptq = self.device == "cpu"
            plan = for_stored_bits(self.calibration, self.stored_bits, dtype, device=self.device, gptq=gptq)
            return self._of_plan(plan), context
        if self.recipe is None and self.ratio in (None, 1):
            return [DENSE] * count, context
        try:
            return self._solved_at(context, shape, dtype), context
        except UsageError as error:
            for longer in (1 << power for power in range(context.bit_length(), MAX_CONTEXT.bit_length())):
                try:
                    return self._solved_at(longer, shape, dtype), longer
                except UsageError:
                    continue
            raise error from None

    def _solved_at(self, context: int, shape: AttentionShape, dtype: str) -> Sequence[Recipe]:
        assert self.ratio is not None
        count = len(self.sizes.elastic)
        if isinstance(self.recipe, str):
            return [resolve(self.recipe, self.ratio, context, shape, dtype)] * count
        if self.calibration is None:
            return [for_ratio(self.ratio, context, shape, dtype)] * count
        plan = for_ratio_by_layer(self.calibration, self.ratio, context, dtype, device=self.device, gptq=self.device == "cpu")
        return self._of_plan(plan)

    def _of_plan(self, plan: LayerPlan) -> Sequence[Recipe]:
        assert self.calibration is not None
        by_layer = dict(zip(self.calibration.layers, plan.recipes, strict=True))
        return [by_layer[layer] for layer in self.sizes.elastic]

    def statistics_of(self, layer: int) -> StorageStatistics:
        """Return what the calibration says of how a layer's tokens are stored; nothing without one."""
        return StorageStatistics() if self.calibration is None else self.calibration.statistics_of(layer)

    def warn_uncalibrated(self, model_name: str) -> None:
        """Warn that all heads read the same share, with the expected loss and the command that calibrates."""
        if self.ratio is None or self.recipe is not None or self.calibration is not None or not self.sizes.elastic:
            return
        budget = self.budget_for(self.context or self.usual, "bf16")
        recipe = budget.recipes[self.sizes.elastic[0]]
        if recipe.selection != "pages":
            return
        loss = predicted_loss(recipe, budget.shape.head_dim)
        warnings.warn(
            f"compress={self.ratio:g} without a calibration: all KV heads read the same share of pages; at {budget.context} "
            f"tokens that is {recipe}, expected loss {loss:.3f}; "
            f"to lose less: elastickv calibrate {model_name} --text FILE, then calibration=FILE",
            UncalibratedWarning,
            stacklevel=outside(),
        )

    def warn_windowed(self, model_name: str) -> None:
        """Warn that there is nothing to compress."""
        if self.ratio == 1:
            return
        warnings.warn(
            f"every layer of {model_name} attends to a window and keeps Transformers' own cache: nothing is compressed",
            UserWarning,
            stacklevel=outside(),
        )

    def expect(self, positions: int, padding: int) -> None:
        """Note that the running `generate` will fill up to `positions` positions, at least `padding` of each row with padding.

        Raises
        ------
        UsageError : if that exceeds the capacity or the model's positions, before anything is computed.
        """
        self.check_length(positions - padding, 0)
        self.expected = positions

    def check_length(self, longest: int, held: int) -> None:
        """Check that rows of `longest` tokens fit the capacity and the model's positions; `held` of them are stored.

        Raises
        ------
        UsageError : naming the limit.
        """
        positions = self.sizes.max_positions
        already = f" ({held} are held)" if held else ""
        if self.capacity is not None and longest > self.capacity:
            raise UsageError(
                f"{longest} tokens{already} exceed the cache's capacity of {self.capacity}: give a larger capacity, a "
                "shorter prompt or fewer new tokens"
            )
        if positions is not None and longest > positions:
            raise UsageError(
                f"{longest} tokens{already} exceed the model's {positions} positions (max_position_embeddings): give a "
                "shorter prompt or fewer new tokens"
            )

    def copy(self) -> ElasticConfig:
        """Return an independent copy, with its own backends."""
        return replace(self, backends=Backends())


def config_for(
    sizes: Sizes,
    compress: float | None,
    recipe: RecipeLike | Path | Mapping[int, RecipeLike] | Sequence[RecipeLike] | None,
    layers: Mapping[int, RecipeLike] | None,
    calibration: ModelCalibration | Path | str | None,
    context: int | None,
    capacity: int | None,
    prefill: str,
    stored_bits: float | None = None,
) -> ElasticConfig:
    """Return the config for the arguments of `ElasticCache.for_model`.

    Raises
    ------
    UsageError : if arguments contradict each other, are out of range, or name a missing file.
    """
    if prefill not in PREFILLS:
        raise UsageError(f"prefill={prefill!r} is unknown: choose {' or '.join(map(repr, PREFILLS))}")
    for name, value in (("context", context), ("capacity", capacity)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_CONTEXT):
            raise UsageError(f"{name}={value!r} is out of range: give a whole number of tokens from 1 to {MAX_CONTEXT}")
    if context is not None and capacity is not None and context > capacity:
        raise UsageError(f"context={context} exceeds capacity={capacity}: no row can reach it")
    if compress is not None:
        number: Any = compress
        if isinstance(number, bool) or not isinstance(number, Real):
            raise UsageError(f"compress={number!r} is not a number: give one from 1 to 1024")
        compress = float(number)
        check_ratio(compress)
    single = {} if layers is None else {layer: _parsed(value) for layer, value in layers.items()}
    chosen: RecipeLike | None = None
    if isinstance(recipe, Mapping):
        single = {layer: _parsed(value) for layer, value in recipe.items()} | single
    elif isinstance(recipe, Recipe):
        chosen = recipe
    elif isinstance(recipe, os.PathLike) or (isinstance(recipe, str) and file_exists(recipe)):
        record = recipes_in(file_path(recipe))
        if isinstance(record, ModelCalibration):
            calibration = record
        else:
            chosen, of_file = record
            single = dict(of_file) | single
    elif isinstance(recipe, str):
        chosen = _open_or_parsed(recipe)
    elif recipe is not None:
        by_layer = [_parsed(value) for value in (recipe if isinstance(recipe, Sequence) else (recipe,))]
        if len(by_layer) != len(sizes.elastic):
            raise UsageError(f"recipe= names {len(by_layer)} recipes for {len(sizes.elastic)} layers with full attention")
        single = dict(zip(sizes.elastic, by_layer, strict=True)) | single
    if calibration is not None and not isinstance(calibration, ModelCalibration):
        calibration = ModelCalibration.load(calibration)
    for named in (chosen, *single.values()):
        if isinstance(named, Recipe) and sizes.elastic:
            named.check_shape(sizes.stored_head_dim, sizes.kv_heads)
    covered = set(sizes.elastic) <= set(single)
    if stored_bits is not None:
        _check_stored_bits(stored_bits, calibration, compress is not None or chosen is not None or bool(single))
    if unknown := sorted(set(single) - set(sizes.elastic)):
        raise UsageError(f"layer {unknown[0]} has no full attention: recipes can be given for {_numbers(sizes.elastic)}")
    if chosen is None and compress is None and stored_bits is None and not covered:
        raise UsageError("neither compress nor a recipe is given: give compress=4, or recipe='int4', or recipe=FILE")
    if isinstance(chosen, Recipe) and compress is not None:
        raise UsageError(f"compress={compress:g} and the recipe {chosen} are both given: the recipe fixes the ratio; give one")
    if isinstance(chosen, str) and compress is None:
        raise UsageError(f"recipe {chosen!r} leaves a number open: give compress too, or write the number")
    named_recipes = [named for named in (chosen, *single.values()) if isinstance(named, Recipe)]
    if calibration is not None:
        used = any(named.rotates_keys or named.uses_hessians for named in named_recipes)
        _check_calibration(calibration, sizes, compress is not None or stored_bits is not None or used)
    for named in named_recipes:
        if named.uses_hessians and (calibration is None or calibration.hessians is None):
            raise no_hessians(named)
    bits = None if stored_bits is None else float(stored_bits)
    return ElasticConfig(sizes, compress, chosen, single, calibration, context, capacity, prefill, stored_bits=bits)


def outside(*others: str) -> int:
    """Return the `stacklevel` of the first caller outside elastickv and the packages `others`, for warnings."""
    inside = ("elastickv", "contextlib", *others)
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in inside:
        frame, level = frame.f_back, level + 1
    return level


def _check_stored_bits(bits: float, calibration: ModelCalibration | None, others: bool) -> None:
    check_stored_bits(bits)
    if others:
        raise UsageError(
            f"`stored_bits`={bits:g} chooses the recipe of each layer: leave out compress, recipe and layers, or `stored_bits`"
        )
    if calibration is None:
        raise UsageError(f"`stored_bits`={bits:g} needs a calibration: run `elastickv calibrate`, then give calibration=FILE")


def _check_calibration(calibration: ModelCalibration, sizes: Sizes, used: bool) -> None:
    if not used:
        raise UsageError(
            "a calibration is not a recipe: give compress too, or stored_bits, and recipes are solved for it, or a recipe with "
            "rotate=k or rounding=gptq"
        )
    missing = sorted(set(sizes.elastic) - set(calibration.layers))
    heads = (calibration.query_heads, calibration.kv_heads, calibration.head_dim)
    if missing or heads != (sizes.query_heads, sizes.kv_heads, sizes.head_dim):
        raise UsageError(f"the calibration is of {calibration.model}, whose layers or heads differ: run `elastickv calibrate`")


def _open_or_parsed(text: str) -> RecipeLike:
    if text.strip() == AUTO:
        return AUTO
    try:
        return Recipe.parse(text)
    except UsageError as error:
        if "leaves" in str(error):
            return text
        if any(mark in text for mark in ("/", "\\", ".json")) and "=" not in text:
            raise UsageError(f"recipe file {text} does not exist: give a file, a Recipe, or a text such as 'int4'") from None
        raise


def _parsed(value: RecipeLike) -> Recipe:
    if isinstance(value, Recipe):
        return value
    if not isinstance(value, str):
        raise UsageError(f"{value!r} is not a recipe: give a Recipe or its text, such as 'int4,pages=1/4'")
    return Recipe.parse(value)


def recipes_in(path: Path) -> ModelCalibration | tuple[Recipe | None, dict[int, Recipe]]:
    """Read a calibration, a JSON file of recipes, or a file with the text of one recipe.

    Returns
    -------
    recipes : that of all layers, if there is one, and those of single layers.

    Raises
    ------
    UsageError : if the file is none of these.
    """
    text = read_text(path, f"recipe file {path}", "give a calibration, recipes, or a file of one recipe's text")
    if not text.lstrip().startswith("{"):
        return Recipe.parse(text.strip()), {}
    try:
        record: Any = parse_json(text)
    except ValueError as error:
        raise UsageError(f"recipe file {path} is not JSON: {error}") from None
    if record.get("format") == CALIBRATION_FORMAT:
        return ModelCalibration.loads(text, str(path))
    if record.get("format") != RECIPES_FORMAT or record.get("version") != 1:
        raise UsageError(
            f"recipe file {path} is neither a calibration nor recipes: its format is {record.get('format')!r}, version "
            f"{record.get('version')!r}; {RECIPES_FORMAT!r}, version 1 is read"
        )
    whole = record.get("recipe")
    layers = record.get("layers", {})
    if not isinstance(layers, dict) or not all(re.fullmatch("[0-9]{1,6}", number) for number in layers):
        raise UsageError(f"recipe file {path}: 'layers' maps numbers of layers to recipes")
    return None if whole is None else _parsed(whole), {int(number): _parsed(value) for number, value in layers.items()}


def _numbers(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) if layers else "none"
