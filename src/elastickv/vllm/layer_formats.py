"""The page format of each layer, by the options or a calibration, and the slab that holds the largest of them."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from elastickv.errors import UsageError
from elastickv.inputs import decoded, file_path, read_bytes
from elastickv.recipe import AttentionShape, ModelCalibration, Recipe, for_ratio_by_layer, predicted_loss
from elastickv.recipe.calibration import Smoothing
from elastickv.recipe.formats import round_up
from elastickv.recipe.recipe import has_page_bounds
from elastickv.recipe.shape import MAX_CONTEXT
from elastickv.recipe.slab import Slab
from elastickv.recipe.solver import with_pages
from elastickv.vllm.serving_options import KEY, MIN_EXACT_TOKENS, PAGE_FORMATS, ServingOptions, page_recipe

UNMET_REMEDY = f"give a smaller `compress` or `window` of {KEY}, or a larger `max_model_len`, which is the context"
SLAB_ALIGNMENT_BYTES = 128  # a line of a GPU's cache; 32 tokens of whole 16-bit numbers, as a cache in a 16-bit dtype is sized


@dataclass(frozen=True)
class SlabPlan:
    """The one size of slab that all layers share.

    Attributes
    ----------
    slab_bytes : bytes of the page of one KV head, those of the largest format.
    wasted_bytes : bytes that smaller formats leave unused, in one page of all layers and KV heads.
    page_bytes : bytes of one page of all layers and KV heads.
    """

    slab_bytes: int
    wasted_bytes: int
    page_bytes: int

    @classmethod
    def of(cls, recipes: Iterable[Recipe], shape: AttentionShape) -> "SlabPlan":
        """Return the plan for layers of these recipes, one for each layer.

        Raises
        ------
        ValueError : if there is no recipe, or a dense one.
        """
        sizes = [Slab.of(recipe, shape.head_dim).n_bytes for recipe in recipes]
        slab = round_up(max(sizes), SLAB_ALIGNMENT_BYTES)
        return cls(slab, sum(slab - size for size in sizes) * shape.kv_heads, slab * len(sizes) * shape.kv_heads)

    def __str__(self) -> str:
        """Return the line for the log."""
        return (
            f"slab {self.slab_bytes:,} B a page and KV head; layers of smaller formats leave {self.wasted_bytes:,} of "
            f"{self.page_bytes:,} B unused ({self.wasted_bytes / self.page_bytes:.1%})"
        )


def calibration_hash(path: str) -> str:
    """Return the SHA-256 of a calibration file's content, 64 hex digits.

    Raises
    ------
    UsageError : if the file cannot be read.
    """
    return hashlib.sha256(_content(path)).hexdigest()


def with_calibration_hash(additional_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return vLLM's `additional_config` with the hash of the calibration that it names, so that vLLM's own hash depends on it.

    Without a calibration it is returned as it is.

    Raises
    ------
    UsageError : as `ServingOptions.parse`; if the file cannot be read, or is not the one that a hash there already names.
    """
    options = ServingOptions.parse(additional_config)
    if options is None or options.calibration is None:
        return dict(additional_config)
    content = _checked_content(options, options.calibration)
    ours = dict(additional_config[KEY]) | {"calibration_hash": hashlib.sha256(content).hexdigest()}
    return dict(additional_config) | {KEY: ours}


def read_calibration(options: ServingOptions) -> ModelCalibration | None:
    """Return the calibration that the options name, or None.

    Raises
    ------
    UsageError : if it cannot be read, is none, or has changed since its hash was taken.
    """
    if options.calibration is None:
        return None
    path = options.calibration
    content = _checked_content(options, path)
    return ModelCalibration.loads(decoded(content, f"calibration {path}", _REMEDY), path)


@dataclass(frozen=True)
class ServedModel:
    """What the formats of layers depend on, the same on all ranks of a model.

    Attributes
    ----------
    shape : of its layers, all heads and not a rank's share; the batch does not matter.
    layer_count : layers of the model.
    context : the most tokens that a request may have.
    dtype : the model's own, 'fp32', 'fp16' or 'bf16'.
    device : 'cpu' or 'cuda', whose kernels serve; None: formats that both read.
    fingerprint : of configuration and weights, or None where it is not known; then a calibration's sizes alone are compared.
    """

    shape: AttentionShape
    layer_count: int
    context: int
    dtype: str = "bf16"
    device: str | None = None
    fingerprint: str | None = None

    @classmethod
    def of(cls, config: Any, head_dim: int, dtype: str, device: str, fingerprint: str | None = None) -> "ServedModel":
        """Return what vLLM's configuration says of the model, and these attributes."""
        model = config.model_config
        query_heads = model.model_arch_config.total_num_attention_heads
        return cls(
            shape=AttentionShape(1, query_heads, model.get_total_num_kv_heads(), head_dim),
            layer_count=model.get_total_num_hidden_layers(),
            context=model.max_model_len,
            dtype=dtype,
            device=device,
            fingerprint=fingerprint,
        )

    @property
    def solved_context(self) -> int:
        """The context at which a ratio is met."""
        return min(self.context, MAX_CONTEXT)


def layer_recipes(
    options: ServingOptions,
    default_recipe: Recipe,
    layer_numbers: Iterable[int],
    model: ServedModel,
    remedy: str = UNMET_REMEDY,
) -> dict[int, Recipe]:
    """Return the recipe of every layer of the model: layer number -> recipe.

    With `compress` recipes may select pages; without a calibration, all KV heads of all layers have one share of them.

    All ranks get the same recipes, and so one size of slab, whichever of the layers they serve.

    Parameters
    ----------
    default_recipe : of layers for which neither the option `layers` nor a calibration says another.
    layer_numbers : of the layers that this rank serves, as in vLLM's names of layers.
    remedy : what the message of a ratio that is not met says to do.

    Raises
    ------
    UsageError : if the option `layers` names a layer that the model does not have, the calibration is of another model, or the
        ratio cannot be met.
    """
    for each in options.layers:
        if each.last >= model.layer_count:
            raise UsageError(
                f"{KEY} option layers names layer {each.last} and the model has {model.layer_count}: give layers from 0 to "
                f"{model.layer_count - 1}"
            )
    numbers = sorted(layer_numbers)
    overridden = {number: page_recipe(each.format, options.window) for each in options.layers for number in each.numbers}
    calibration, recipe = read_calibration(options), default_recipe
    if options.compress is not None and calibration is None:
        remedy = remedy if has_page_bounds(default_recipe.key_format) else _OTHER_FORMAT
        recipe = with_pages(default_recipe, options.compress, model.solved_context, model.shape, model.dtype, remedy)
    if options.compress is None or calibration is None:
        recipes = dict.fromkeys(range(model.layer_count), recipe)
    else:
        check_fits(calibration, options, numbers, model)
        plan = for_ratio_by_layer(
            calibration,
            options.compress,
            model.solved_context,
            model.dtype,
            sinks=0,
            window=options.window,
            stored_by_layer=True,  # a slab holds the largest format
            select_pages=options.select_pages,
            device=model.device,
            remedy=remedy,
        )
        recipes = dict(zip(calibration.layers, plan.recipes, strict=True))
    return recipes | overridden


def at_ratio(recipes: Mapping[int, Recipe], ratio: float, model: ServedModel) -> dict[int, Recipe]:
    """Return recipes of all layers with larger shares of the pages, in proportion, that meet a smaller ratio."""
    from elastickv.transformers.budget import Budget, scaled  # its package loads Transformers

    budget = Budget(recipes, model.shape, model.dtype, ratio, context=0, fixed=False)
    scale = budget.reading(model.solved_context).scale
    return {layer: scaled(recipe, scale) for layer, recipe in recipes.items()}


def selection_line(recipes: Mapping[int, Recipe], model: ServedModel) -> str:
    """Return the line for the log about a selection of pages."""
    from elastickv.transformers.budget import Budget

    context = model.solved_context
    ratio = Budget(recipes, model.shape, model.dtype, None, context, fixed=False).ratio_at(context, 1.0)
    return f"decodes read selected pages: 1/{ratio:.2f} of the dense bytes at {context} tokens"


def uncalibrated(options: ServingOptions, recipe: Recipe, model: ServedModel) -> str:
    """Return the warning of a selection that no calibration chose."""
    loss = predicted_loss(recipe, model.shape.head_dim)
    expected = "a loss that was not measured for its formats" if loss is None else f"expected loss {loss:.3f}"
    return (
        f"compress={options.compress:g} without a calibration: all KV heads read the same share of pages; at "
        f"{model.solved_context} tokens that is {recipe}, {expected}; to lose less: elastickv calibrate, then the option "
        "calibration"
    )


def layer_smoothing(options: ServingOptions) -> dict[int, Smoothing]:
    """Return the smoothing of rotated keys by layer number, as the calibration has it; none where there is no calibration.

    Raises
    ------
    UsageError : as `read_calibration`.
    """
    calibration = read_calibration(options)
    if calibration is None or calibration.smoothing is None:
        return {}
    return dict(zip(calibration.layers, calibration.smoothing, strict=True))


def check_fits(
    calibration: ModelCalibration, options: ServingOptions, layer_numbers: Iterable[int], model: ServedModel
) -> None:
    """Check that a calibration is of the model that is served; `layer_recipes` describes the parameters.

    Raises
    ------
    UsageError : if its fingerprint, heads, head size or layers are others.
    """
    if model.fingerprint is not None:
        calibration.check_model(model.fingerprint)
    name, shape = f"calibration {options.calibration} is of {calibration.model}", model.shape
    remedy = "run `elastickv calibrate` on the model that is served"
    for what, measured, present in (
        ("query heads", calibration.query_heads, shape.query_heads),
        ("KV heads", calibration.kv_heads, shape.kv_heads),
        ("channels a head", calibration.head_dim, shape.head_dim),
    ):
        if measured != present:
            raise UsageError(f"{name} with {measured} {what}, and this model has {present}: {remedy}")
    last = max(calibration.layers)
    if last >= model.layer_count:
        raise UsageError(f"{name} with a layer {last}, and this model has {model.layer_count} layers: {remedy}")
    known = {*calibration.layers, *(number for each in options.layers for number in each.numbers)}
    missing = [number for number in layer_numbers if number not in known]
    if missing:
        raise UsageError(
            f"{name} and has no errors of layer {missing[0]}, which is served: {remedy}, or name the layer's format in the "
            "option layers"
        )


_SELECTABLE = " or ".join(name for name in PAGE_FORMATS if has_page_bounds(page_recipe(name, MIN_EXACT_TOKENS).key_format))
_OTHER_FORMAT = f"give a smaller `compress`, or a `format` whose pages can be selected: {_SELECTABLE}"
_REMEDY = "give a file that `elastickv calibrate` wrote"


def _content(path: str) -> bytes:
    return read_bytes(file_path(path), f"calibration {path}", _REMEDY)


def _checked_content(options: ServingOptions, path: str) -> bytes:
    content = _content(path)
    if options.calibration_hash not in (None, hashlib.sha256(content).hexdigest()):
        raise UsageError(
            f"calibration {path} is not the file that calibration_hash names: it has changed or differs between hosts; start "
            "again with the same file everywhere"
        )
    return content
