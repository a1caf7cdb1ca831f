"""The model that an evaluation measures, and the ways to decode with it: a recipe for each ratio, and the stock caches."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elastickv.errors import UsageError
from elastickv.evaluation import sessions
from elastickv.evaluation.prefill import prefill
from elastickv.evaluation.recipes_by_ratio import RatioRecipes, Span, plan
from elastickv.evaluation.scoring import Open
from elastickv.recipe import AttentionShape, ModelCalibration, Recipe
from elastickv.transformers.config import KeyFormatWarning
from elastickv.transformers.layer_tokens import sampled_keys
from elastickv.transformers.model_loading import Loaded, fingerprint
from elastickv.transformers.model_support import device_kind, sizes_of, text_config
from elastickv.transformers.torch_dtypes import DTYPE_NAMES

STOCK_QUANTIZED = "stock-quantized"
_KEY_TOKENS = 2048  # of a prompt, by whose keys recipes are chosen without a calibration


class Subject:
    """A loaded model and its calibration.

    Attributes
    ----------
    shape : of one sequence of a layer with full attention, as it is stored: heads may be padded.
    elastic : indices of these layers; recipes, calibrations and bytes are theirs.
    positions : the model's longest context in tokens, or None.
    device : the kind of device that decodes; None if there are several.
    """

    def __init__(self, loaded: Loaded, calibration: ModelCalibration | None) -> None:
        self.loaded, self.model, self.calibration = loaded, loaded.model, calibration
        sizes = sizes_of(self.model)
        if not sizes.elastic:
            raise UsageError(f"every layer of {loaded.name} attends to a window, so nothing is compressed: nothing to evaluate")
        self.fingerprint = fingerprint(self.model)
        if calibration is not None:
            calibration.check_model(self.fingerprint, loaded.name)
        self.shape = AttentionShape(1, sizes.query_heads, sizes.kv_heads, sizes.stored_head_dim)
        self.elastic, self.positions, self.head_dim = sizes.elastic, sizes.max_positions, sizes.head_dim
        self.dtype, self.device = DTYPE_NAMES[self.model.dtype], device_kind(self.model)
        self._keys: list[NDArray[np.float32]] | None = None
        self._warned: set[float] = set()

    @property
    def layers(self) -> int:
        """Number of layers with full attention."""
        return len(self.elastic)

    def check_room(self, tokens: int, advice: str = "a shorter `context`") -> None:
        """Refuse more tokens than the model has positions."""
        most = self.positions
        if most is not None and tokens > most:
            raise UsageError(f"{tokens} tokens are needed and {self.loaded.name} has {most} positions: give {advice}")

    def described(self) -> dict[str, Any]:
        """Return what the result says of the model."""
        shape = {name: getattr(self.shape, name) for name in ("query_heads", "kv_heads")}
        return {
            "name": self.loaded.name,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "device": str(self.model.device),
            **({"device_name": torch.cuda.get_device_name(self.model.device)} if self.model.device.type == "cuda" else {}),
            "layers": int(text_config(self.model).num_hidden_layers),
            "elastic_layers": self.layers,
            **shape,
            "head_dim": self.head_dim,
        }

    def judge_keys(self, ids: Sequence[int]) -> None:
        """Let the keys of a prompt decide between scales of tokens and of channels, as in `ElasticCache`; see `plan`.

        With a calibration, which has measured both, they decide nothing.
        """
        if self.calibration is not None or len(ids) < 2:
            return
        ids = ids[:_KEY_TOKENS]
        start = prefill(self.model, [ids], len(ids) - 1, 1)
        every = np.array([start.tokens])
        self._keys = [sampled_keys(start.keys[number], every, Recipe.parse("int8")) for number in self.elastic]

    def plan(self, ratio: float, span: Span) -> RatioRecipes:
        """Return the recipes that an `ElasticCache` chooses for a ratio, with the calibration or by the keys of a prompt.

        Raises
        ------
        UsageError : if no recipe meets the ratio.
        """
        solved = plan(ratio, span, self.shape, self.layers, self.dtype, self.calibration, self.device, self._keys)
        if solved.by_keys and ratio not in self._warned:
            self._warned.add(ratio)
            layers = ", ".join(str(self.elastic[n]) for n in solved.by_keys)
            warnings.warn(
                f"compress={ratio:g} without a calibration: a scale for each token does not suit the keys of layers {layers}, "
                f"which get {solved.recipes[solved.by_keys[0]]}, as in ElasticCache; to choose by the errors of outputs: "
                "elastickv calibrate",
                KeyFormatWarning,
                stacklevel=2,
            )
        return solved

    def decoding(self, recipes: Sequence[Recipe]) -> Open:
        """Return what decodes with recipes, one for each layer with full attention."""
        return lambda start, tokens: sessions.elastic(self.model, recipes, start, tokens, self.calibration)


@dataclass(frozen=True)
class DecodePath:
    """One way to decode.

    Attributes
    ----------
    name : as in results.
    decoding : opens a session that decodes so.
    figures : what a result's row says of recipes, formats and bytes.
    """

    name: str
    decoding: Open
    figures: dict[str, Any]


def decode_paths(
    subject: Subject, ratios: Sequence[float], span: Span, stock_quantized: bool
) -> tuple[list[DecodePath], list[str]]:
    """Return a path for each ratio that a recipe meets, and the reasons why the other ratios have none.

    Parameters
    ----------
    span : the decode steps over which a recipe must meet its ratio.
    stock_quantized : whether Transformers' quantized cache is another path.
    """
    paths, reasons = [], []
    for ratio in ratios:
        try:
            recipes = subject.plan(ratio, span)
        except UsageError as error:
            reasons.append(str(error))
            continue
        paths.append(DecodePath(f"C={ratio:g}", subject.decoding(recipes.recipes), ratio_figures(recipes)))
    if stock_quantized:
        sessions.check_quantizable(subject.model)
        quantizer = sessions.quantizer()
        figures = {"compress": None, "quantiser": quantizer, "bits": sessions.QUANTIZED_BITS[quantizer]}
        stock: Open = lambda start, _: sessions.stock_quantized(subject.model, start)  # noqa: E731
        paths.append(DecodePath(STOCK_QUANTIZED, stock, figures))
    return paths, reasons


def ratio_figures(plan: RatioRecipes) -> dict[str, Any]:
    """Return what a row says of the recipes of a ratio."""
    return {
        "compress": plan.ratio,
        "recipe_hash": plan.hash,
        "recipes": [str(recipe) for recipe in plan.recipes],
        "read_ratio": plan.read_ratio,
        "stored_ratio": plan.stored_ratio,
        "step_bytes_read": plan.step_bytes,
        "bytes_stored": plan.stored_bytes,
        "expected_error": plan.expected_error,
    }
