"""Turn a user's text into a recipe: `auto`, a recipe, or a recipe with one number left to the solver."""

import math
from dataclasses import replace

from elastickv.errors import UsageError
from elastickv.recipe.formats import sixteen_bit
from elastickv.recipe.recipe import MAX_STRIDE, Recipe, parse_open
from elastickv.recipe.shape import AttentionShape
from elastickv.recipe.solver import LEAST_FRACTION, check_context, check_ratio, for_ratio, meets, solve_fraction, unmet


def resolve(
    text: str,
    ratio: float,
    context: int,
    shape: AttentionShape,
    dtype: str = "bf16",
    sinks: int | None = None,
    window: int | None = None,
    anchor_every: int | None = None,
) -> Recipe:
    """Return the recipe that `text` names, with its open number decided by `ratio`.

    `auto` is `for_ratio`. `pages` without a fraction takes as many pages as the ratio allows, `stride` without a number the
    least step that meets it. `reuse` without one anchors every `ceil(ratio)` steps, the original micro-benchmark's schedule.
    `sinks`, `window` and `anchor_every` override; with `auto`, `anchor_every` applies to the recipes that have anchors.

    Raises
    ------
    UsageError : if the text is no recipe, does not fit the shape, or leaves a number open that no value meets the ratio with.
    """
    check_ratio(ratio)
    check_context(context)
    fixed = {"sinks": sinks, "window": window, "anchor_every": anchor_every}
    overrides = {name: value for name, value in fixed.items() if value is not None}
    if text.strip() == "auto":
        return for_ratio(ratio, context, shape, dtype, **overrides)  # type: ignore[arg-type]
    recipe, open_field = parse_open(text, sixteen_bit(dtype))
    if open_field == "anchor_every" and anchor_every is None:
        recipe = replace(recipe, anchor_every=math.ceil(ratio))
    recipe = replace(recipe, **overrides)  # type: ignore[arg-type]
    recipe.check_shape(shape.head_dim, shape.kv_heads)
    if open_field == "pages":
        solved = solve_fraction(recipe, ratio, context, shape, dtype)
        least = [replace(recipe, fractions=(LEAST_FRACTION,))]
    elif open_field == "stride":
        steps = [replace(recipe, stride=stride) for stride in range(1, MAX_STRIDE + 1)]
        solved = next((step for step in steps if meets(step, ratio, context, shape, dtype)), None)
        least = steps
    else:
        return recipe
    if solved is None:
        raise UsageError(unmet(ratio, context, shape, dtype, least))
    return solved
