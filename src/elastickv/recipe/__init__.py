"""Recipes: what is stored, in which format, and when it is refreshed. Pure values: nothing here touches an array."""

from elastickv.recipe.allocation import Calibration
from elastickv.recipe.byte_counts import (
    StepBytes,
    dense_bytes,
    interval_bytes,
    largest_step_bytes,
    read_ratio,
    step_bytes,
    stored_bits,
    stored_bytes,
    stored_ratio,
)
from elastickv.recipe.calibration import ModelCalibration
from elastickv.recipe.formats import DTYPES, FORMATS, Format
from elastickv.recipe.layer_solver import LayerPlan, for_ratio_by_layer, for_stored_bits
from elastickv.recipe.losses import predicted_loss
from elastickv.recipe.recipe import DENSE, Recipe
from elastickv.recipe.regions import PAGE_TOKENS, Regions, regions
from elastickv.recipe.resolve import resolve
from elastickv.recipe.shape import HEAD_DIMS, AttentionShape
from elastickv.recipe.solver import explanation, for_ratio, largest_ratio_scoring_every_step

__all__ = [
    "DENSE",
    "DTYPES",
    "FORMATS",
    "HEAD_DIMS",
    "PAGE_TOKENS",
    "AttentionShape",
    "Calibration",
    "Format",
    "LayerPlan",
    "ModelCalibration",
    "Recipe",
    "Regions",
    "StepBytes",
    "dense_bytes",
    "explanation",
    "for_ratio",
    "for_ratio_by_layer",
    "for_stored_bits",
    "interval_bytes",
    "largest_ratio_scoring_every_step",
    "largest_step_bytes",
    "predicted_loss",
    "read_ratio",
    "regions",
    "resolve",
    "step_bytes",
    "stored_bits",
    "stored_bytes",
    "stored_ratio",
]
