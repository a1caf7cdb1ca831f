"""From a budget to a recipe: the least predicted recipe error among those that read at most 1/C of the dense bytes."""

import math
from collections.abc import Iterator
from dataclasses import replace

from elastickv.errors import UsageError
from elastickv.recipe.accounting import read_ratio
from elastickv.recipe.formats import sixteen_bit
from elastickv.recipe.pages import PAGE_TOKENS
from elastickv.recipe.recipe import DEFAULT_SINKS, DEFAULT_WINDOW, DENSE, MAX_STRIDE, Recipe, parse_open
from elastickv.recipe.shape import MAX_CONTEXT, AttentionShape

MAX_RATIO = 1024.0


def candidates(dtype: str, sinks: int, window: int) -> Iterator[Recipe]:
    """Yield recipes from least to most recipe error: rounding to 8 bits costs less than any dropped token."""
    yield DENSE
    yield Recipe("int8", "int8", sinks=sinks, window=window)
    for stride in range(2, MAX_STRIDE + 1):
        for cold_format in (sixteen_bit(dtype), "int8"):
            yield Recipe(cold_format, cold_format, selection="stride", stride=stride, sinks=sinks, window=window)


def for_ratio(
    ratio: float,
    context: int,
    shape: AttentionShape,
    dtype: str = "bf16",
    sinks: int = DEFAULT_SINKS,
    window: int = DEFAULT_WINDOW,
) -> Recipe:
    """Return the recipe of least predicted error that reads at most 1/ratio of the dense bytes at `context` tokens.

    Raises
    ------
    UsageError : if `ratio` is out of range, or no recipe meets it at this context; the message names the context from
        which one does.
    """
    check_ratio(ratio)
    if ratio == 1:
        return DENSE
    for recipe in candidates(dtype, sinks, window):
        if _meets(recipe, ratio, context, shape, dtype):
            return recipe
    raise UsageError(_unmet(ratio, context, shape, dtype, list(candidates(dtype, sinks, window))))


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
    """Return the recipe that `text` asks for, its open number decided by `ratio`.

    `auto` is `for_ratio`. `stride` without a number takes the least step that meets the ratio. `reuse` without one anchors
    every `ceil(ratio)` steps, the original micro-benchmark's schedule. `sinks`, `window` and `anchor_every` override.

    Raises
    ------
    UsageError : if the text is no recipe, or a number is open and no value meets the ratio.
    """
    check_ratio(ratio)
    fixed = {"sinks": sinks, "window": window, "anchor_every": anchor_every}
    overrides = {name: value for name, value in fixed.items() if value is not None}
    if text.strip() == "auto":
        if anchor_every not in (None, 1):
            raise UsageError(f"anchor_every={anchor_every} needs a recipe with anchors: --recipe reuse")
        regions_ = {name: value for name, value in overrides.items() if name != "anchor_every"}
        return for_ratio(ratio, context, shape, dtype, **regions_)
    recipe, open_field = parse_open(text, sixteen_bit(dtype))
    if open_field == "anchor_every" and anchor_every is None:
        recipe = replace(recipe, anchor_every=math.ceil(ratio))
    recipe = replace(recipe, **overrides)  # type: ignore[arg-type]
    if open_field != "stride":
        return recipe
    steps = [replace(recipe, stride=stride) for stride in range(1, MAX_STRIDE + 1)]
    for candidate in steps:
        if _meets(candidate, ratio, context, shape, dtype):
            return candidate
    raise UsageError(_unmet(ratio, context, shape, dtype, steps))


def check_ratio(ratio: float) -> None:
    """Refuse a ratio that is no number from 1 to 1024."""
    if not 1 <= ratio <= MAX_RATIO:
        raise UsageError(f"compress={ratio:g} is out of range: give a number from 1 to {MAX_RATIO:g}")


def _meets(recipe: Recipe, ratio: float, context: int, shape: AttentionShape, dtype: str) -> bool:
    return read_ratio(recipe, [context], shape, dtype) >= ratio


def _unmet(ratio: float, context: int, shape: AttentionShape, dtype: str, recipes: list[Recipe]) -> str:
    best = max(recipes, key=lambda r: read_ratio(r, [context], shape, dtype))
    reached = read_ratio(best, [context], shape, dtype)
    start = _holds_from(ratio, context, shape, dtype, recipes)
    remedy = f"it can be met from a context of {start}" if start else f"no context up to {MAX_CONTEXT} meets it"
    return (
        f"compress={ratio:g} cannot be met at a context of {context}: the largest ratio is {reached:.2f} ({best}); {remedy}; "
        "give a smaller --compress, a longer context, or fewer --sinks and --window"
    )


def _holds_from(ratio: float, context: int, shape: AttentionShape, dtype: str, recipes: list[Recipe]) -> int | None:
    """Return the least context from which on `ratio` can be met at every context, or None below the longest supported."""

    def met(n: int) -> bool:
        return any(_meets(r, ratio, n, shape, dtype) for r in recipes)

    def met_throughout(n: int) -> bool:
        return all(met(m) for m in range(n, n + PAGE_TOKENS))

    if not met_throughout(MAX_CONTEXT - PAGE_TOKENS):
        return None
    low, high = context, MAX_CONTEXT - PAGE_TOKENS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if met_throughout(middle) else (middle, high)
    return high
