"""What runs under the sanitizer is every kernel in every format."""

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from benchmarks.sanitize import CASES
from elastickv.backends.cuda.builds import all_variants
from elastickv.backends.cuda.kernel_selection import Split, blocks_variant, decode_variant, split_variant
from elastickv.recipe import AttentionShape, Recipe

# Sizes: the same code with other bounds.
SIZES = {
    "HEAD_DIM",
    "QTILES",
    "TILES",
    "TILE",
    "WARPS",
    "MIN_BLOCKS",
    "STAGES",
    "SHARED_BYTES",
    "V_GROUP",
    "PREFETCH",
    "UNROLL",
}


def code(variant):
    return variant.source, tuple(
        (name, value) for name, value in variant.macros if name not in SIZES | {"SPLITS", "EXACT_TYPE"}
    )


def run_by(case):
    """Every variant that a case launches on an H100."""
    shape, recipe = AttentionShape(*case.shape), Recipe.parse(case.recipe)
    if case.kernel == "blocks":
        serving = blocks_variant(shape.head_dim, shape.group, case.dtype, recipe, "90")
        selecting = [serving.selecting_blocks()] if recipe.selection == "pages" else []
        return [serving, serving.storing_blocks(), *selecting]
    variant = decode_variant(shape.head_dim, shape.group, case.dtype, recipe, "90", case.kernel)
    if blocks := case.macros.get("SPLITS"):
        variant = split_variant(variant, shape.group, Split(blocks, case.macros.get("CLUSTER", 1) == 1))
    fixed = variant.fixed() if len(set(case.lengths)) == 1 else None
    selecting = variant.selecting() if recipe.selection == "pages" else None
    rotating = variant.rotating() if recipe.rotates_values else None
    others = [variant.storing(recipe.rotate), variant.editing(recipe.rotate), selecting, rotating]
    return filter(None, [fixed or variant, *others])


def test_every_kernel_in_every_format_is_a_case():
    ran = {code(variant) for case in CASES if case.kernel != "ceilings" for variant in run_by(case)}
    missing = {code(variant) for variant in all_variants(["90"]) if variant.source != "ceilings"} - ran
    assert not missing


def test_every_case_has_a_shape_and_rows_of_its_recipe():
    for case in CASES[:-1]:
        shape, recipe = AttentionShape(*case.shape), Recipe.parse(case.recipe)
        recipe.check_shape(shape.head_dim, shape.kv_heads)
        assert len(case.lengths) == shape.batch
