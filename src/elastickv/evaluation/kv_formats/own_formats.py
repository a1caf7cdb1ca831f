"""Our own formats as references: what a recipe stores, without its kernels, on any device.

Codes and scales are those of `kvcache.quantize`, rotations those of `kvcache.hadamard`, and a calibration smooths keys as in an
ElasticCache. A 16-bit model rounds what is rotated to 16 bits before it is quantized, as the window of an ElasticCache does. In
a float32 model nothing is rounded but what the formats round, and exact tokens stay as they are: an ElasticCache rounds
everything to bfloat16 first.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from elastickv.errors import UsageError
from elastickv.evaluation.evaluation_options import REFERENCE
from elastickv.evaluation.kv_formats.reference_format import ReferenceFormat, StoredPlane
from elastickv.evaluation.kv_formats.rotations import rotated_rows
from elastickv.evaluation.prefill import Tensor
from elastickv.evaluation.tensor_codecs import TensorCompensation, stored_rows
from elastickv.inputs import file_exists, file_path
from elastickv.kvcache.gptq import LayerCompensation, check_compensation
from elastickv.recipe import ModelCalibration, Recipe
from elastickv.recipe.calibration import Smoothing
from elastickv.recipe.formats import DTYPES, FORMATS, PAGE_TOKENS, Scales
from elastickv.transformers.config import recipes_in
from elastickv.transformers.torch_dtypes import TORCH_DTYPES


@dataclass(frozen=True)
class OwnRoundTrip:
    """How keys, or values, of one layer are stored and read back.

    Attributes
    ----------
    stored_in : name of a format.
    group : channels of V that share a scale.
    head_dim : channels of a stored head: zeros are added to the model's.
    rotated : whether rows are stored rotated.
    dtype : of the model: rows have it when they are quantized.
    smoothing : (kv_heads, 1, the model's head_dim) powers of 2, factors of keys before they are rotated; None for none.
    compensation : by which codes are chosen; None: the nearest ones.
    """

    stored_in: str
    of_values: bool
    group: int
    head_dim: int
    rotated: bool
    dtype: str
    smoothing: Tensor | None = None
    compensation: TensorCompensation | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return (..., kv_heads, tokens, channels) float32 rows, whole pages of tokens, as they are read after being stored."""
        factors = None if self.smoothing is None else self.smoothing.to(x.device)
        rows = torch.nn.functional.pad(x if factors is None else x * factors, (0, self.head_dim - x.shape[-1]))
        rows = rotated_rows(rows) if self.rotated else rows
        in_window = self.stored_in if self.stored_in in DTYPES else self.dtype
        rows = rows.to(TORCH_DTYPES[in_window]).float()
        if not FORMATS[self.stored_in].is_float:
            compensation = None if self.compensation is None else self.compensation.to(x.device)
            rows = stored_rows(rows, self.stored_in, self.of_values, self.group, compensation)
        read = (rotated_rows(rows) if self.rotated else rows)[..., : x.shape[-1]]
        return read if factors is None else read / factors


@dataclass(frozen=True)
class NamedRecipes:
    """What a format's name says of our recipes, `reference:` left out.

    Attributes
    ----------
    whole : of all layers that are not in `layers`; None for none.
    layers : number of a layer -> its recipe.
    """

    whole: Recipe | None
    layers: Mapping[int, Recipe]

    @classmethod
    def of(cls, name: str) -> "NamedRecipes":
        """Return the recipe, or the file of recipes, that a name stands for.

        Raises
        ------
        UsageError : if it is neither, or a reference selects tokens.
        """
        text = name.removeprefix(REFERENCE)
        try:
            named = cls(Recipe.parse(text), {})
        except UsageError:
            if not file_exists(text):
                raise
            read = recipes_in(file_path(text))
            if isinstance(read, ModelCalibration):
                raise UsageError(f"format {name} is a calibration: give a recipe, or a file of recipes") from None
            named = cls(*read)
        if name.startswith(REFERENCE):
            check_reference(named.all)
        return named

    @property
    def all(self) -> Sequence[Recipe]:
        """Each recipe once."""
        return tuple(dict.fromkeys([*self.layers.values(), *([] if self.whole is None else [self.whole])]))

    def by_layer(self, name: str, layers: Sequence[int]) -> tuple[Recipe, ...]:
        """Return the recipes of layers, with their format's name for messages.

        Raises
        ------
        UsageError : if a layer has none, or what is no layer has one.
        """
        if not set(self.layers) <= set(layers) or (self.whole is None and len(self.layers) < len(layers)):
            expected = ", ".join(map(str, layers))
            raise UsageError(f"format {name} is not of this model, whose layers with full attention are {expected}: name these")
        recipes = (self.layers.get(layer, self.whole) for layer in layers)
        return tuple(recipe for recipe in recipes if recipe is not None)


def check_reference(recipes: Iterable[Recipe]) -> None:
    """Refuse recipes of which a reference is no measure: those that do not read all tokens.

    Raises
    ------
    UsageError : naming the selection.
    """
    for recipe in recipes:
        if recipe.selection != "all":
            raise UsageError(
                f"format {REFERENCE}{recipe} selects by {recipe.selection!r}, and a reference reads all tokens: write "
                f"{REFERENCE}{recipe.formats}, or {recipe} without {REFERENCE}"
            )


def own_format(
    recipe: Recipe,
    head_dim: int,
    dtype: str,
    smoothing: Smoothing | None = None,
    compensation: LayerCompensation | None = None,
) -> ReferenceFormat | None:
    """Return what a recipe stores in one layer, as a reference; None for `dense`, which leaves it as it is.

    Parameters
    ----------
    head_dim : channels of a stored head.
    dtype : of the model.
    smoothing : of the layer's keys, as `ModelCalibration.smoothing_of` returns it: counts where they are rotated.
    compensation : of a recipe with `rounding=gptq`.

    Raises
    ------
    UsageError : if the recipe does not read all tokens, or needs a compensation.
    """
    check_reference([recipe])
    check_compensation(recipe, compensation)
    if recipe.key_format is None or recipe.value_format is None:
        return None
    factors = None
    if smoothing is not None and recipe.rotates_keys:
        factors = torch.tensor(smoothing, dtype=torch.float32).exp2()[:, None]
    parts = (None, None) if compensation is None else (compensation.keys, compensation.values)
    of_keys, of_values = (None if part is None else TensorCompensation.at(part, "cpu") for part in parts)
    key, value, group = FORMATS[recipe.key_format], FORMATS[recipe.value_format], recipe.v_group(head_dim)
    keys = OwnRoundTrip(key.name, False, head_dim, head_dim, recipe.rotates_keys, dtype, factors, of_keys)
    values = OwnRoundTrip(value.name, True, group, head_dim, recipe.rotates_values, dtype, None, of_values)
    return ReferenceFormat(
        f"{REFERENCE}{recipe}",
        _plane(keys, key.key_row_bytes(head_dim), key.key_scales(head_dim), recipe.window),
        _plane(values, value.row_bytes(head_dim), value.value_scales(head_dim, group), recipe.window),
        "recipe",
        recipe.sinks,
    )


def _plane(round_trip: OwnRoundTrip, row_bytes: int, scales: Scales, window: int) -> StoredPlane:
    page_bytes = PAGE_TOKENS * row_bytes + scales.bytes_of(PAGE_TOKENS)
    return StoredPlane(round_trip, lambda _: page_bytes, group=PAGE_TOKENS, window=window)
