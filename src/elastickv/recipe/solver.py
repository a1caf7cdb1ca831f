"""Solve for a recipe: the least predicted loss among the recipes that read at most 1/C of the dense bytes."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from elastickv.errors import UsageError
from elastickv.recipe.allocation import Calibration, allot, check_calibration
from elastickv.recipe.byte_counts import read_ratio
from elastickv.recipe.formats import value_groups
from elastickv.recipe.losses import predicted_loss
from elastickv.recipe.recipe import DEFAULT_SINKS, DEFAULT_WINDOW, DENSE, Recipe, has_page_bounds
from elastickv.recipe.regions import PAGE_TOKENS, regions, selected
from elastickv.recipe.shape import MAX_CONTEXT, AttentionShape, is_whole

MAX_RATIO = 1024.0
ANCHORS = (1, 2, 4, 8, 16)
NARROW = ("int8", "fp8", "int4")
PER_CHANNEL = ("int8_per_channel", "int4")  # for keys that a scale for each token or page does not suit
YARDSTICK = "int4"  # keys are not suited to a format of 8 bits that loses more than this
_RANKED_AS = {"int8_per_channel": "int8"}
ALIKE = 1.03  # a ratio of losses that counts as equal: another text changes them by more
LEAST_FRACTION = 0.5 / MAX_CONTEXT
UNMET_REMEDY = "give a smaller `compress`, a longer `context`, or fewer `sinks` and `window`"


def for_ratio(
    ratio: float,
    context: int,
    shape: AttentionShape,
    dtype: str = "bf16",
    sinks: int = DEFAULT_SINKS,
    window: int = DEFAULT_WINDOW,
    anchor_every: int | None = None,
    calibration: Calibration | None = None,
    key_formats: tuple[str, ...] = NARROW,
) -> Recipe:
    """Return the recipe of least predicted loss that reads at most 1/ratio of the dense bytes at `context` tokens.

    It chooses the formats of K and V, the group of V's scales, the share of the pages and the steps between anchors. Among
    recipes of nearly the same loss (`ALIKE`), it takes the one that selects pages least often, since selecting takes time too.

    Parameters
    ----------
    anchor_every : the steps between anchors, where pages are selected.
    calibration : errors of each KV head by fraction, measured on this layer: the pages are then allotted to the heads by them.
    key_formats : formats of K to choose from. int8 per channel, whose loss was not measured, ranks as int8, which has as many
        bits and loses more.

    Raises
    ------
    UsageError : if `ratio` is out of range, or no recipe meets it at this context; the message names the context from
        which one does.
    """
    check_ratio(ratio)
    check_context(context)
    if calibration is not None:
        check_calibration(calibration, shape.kv_heads)
    schedules = ANCHORS if anchor_every is None else (anchor_every,)
    possible = tuple(candidates(shape, sinks, window, schedules, key_formats))
    if ratio == 1:
        return DENSE
    best = _least_loss(possible, ratio, context, shape, dtype)
    if best is None:
        raise UsageError(unmet(ratio, context, shape, dtype, _smallest(sinks, window, schedules)))
    if calibration is not None and best.selection == "pages":
        return _allotted(best, ratio, context, shape, dtype, calibration)
    return best


Recipe.solver = staticmethod(for_ratio)


def with_pages(
    recipe: Recipe, ratio: float, context: int, shape: AttentionShape, dtype: str = "bf16", remedy: str = UNMET_REMEDY
) -> Recipe:
    """Return a recipe's formats with the share of pages, and the steps between anchors, of least predicted loss.

    Parameters
    ----------
    recipe : formats, sinks and window; every page of it is read.
    remedy : what the message of a ratio that is not met says to do.

    Raises
    ------
    UsageError : if `ratio` is out of range, or no share of the pages meets it at this context.
    """
    check_ratio(ratio)
    check_context(context)
    possible: tuple[Recipe, ...] = (recipe,)
    if has_page_bounds(recipe.key_format):
        whole = replace(recipe, selection="pages", fractions=(1.0,))
        possible += tuple(replace(whole, anchor_every=steps) for steps in ANCHORS)
    best = _least_loss(possible, ratio, context, shape, dtype)
    if best is None:
        least = [replace(each, fractions=(LEAST_FRACTION,)) if each.fractions else each for each in possible]
        raise UsageError(unmet(ratio, context, shape, dtype, least, remedy))
    return best


@lru_cache(maxsize=256)
def _least_loss(possible: tuple[Recipe, ...], ratio: float, context: int, shape: AttentionShape, dtype: str) -> Recipe | None:
    """Return the recipe of least predicted loss that meets the ratio, or None; solved once for each input."""
    solved = [solve_fraction(recipe, ratio, context, shape, dtype) for recipe in possible]
    losses = {recipe: _ranking_loss(recipe, shape.head_dim) for recipe in solved if recipe is not None}
    if not losses:
        return None
    alike = [recipe for recipe, loss in losses.items() if loss <= ALIKE * min(losses.values())]

    def rank(recipe: Recipe) -> tuple[float, float, float]:
        selections_a_step = 1 / recipe.anchor_every if recipe.selection == "pages" else 0.0
        return selections_a_step, losses[recipe], -read_ratio(recipe, [context], shape, dtype)

    return min(alike, key=rank)


def _ranking_loss(recipe: Recipe, head_dim: int) -> float:
    measured = replace(recipe, key_format=_RANKED_AS.get(str(recipe.key_format), recipe.key_format))
    loss = predicted_loss(measured, head_dim)
    if loss is None:
        raise UsageError(
            f"keys in {recipe.key_format} have no predicted loss to be ranked by: choose key formats of "
            f"{', '.join([*NARROW, *_RANKED_AS])}, or solve by a calibration, `for_ratio_by_layer` or `for_stored_bits`"
        )
    return loss


def candidates(
    shape: AttentionShape,
    sinks: int,
    window: int,
    schedules: tuple[int, ...] = ANCHORS,
    key_formats: tuple[str, ...] = NARROW,
) -> Iterator[Recipe]:
    """Yield the recipes among which the solver chooses; those with pages have a fraction of 1, which is still to be solved.

    None has a stride: at equal bytes pages lose much less (benchmarks/NOTES.md).
    """
    groups = [0 if group == shape.head_dim else group for group in value_groups(shape.head_dim)]
    values = [("int8", 0), ("fp8", 0), *(("int4", group) for group in groups)]
    for value, group in values:
        for key in key_formats:
            yield Recipe(key, value, value_group=group, sinks=sinks, window=window)
        for anchor_every in schedules:
            whole = Recipe("int4", value, value_group=group, selection="pages", fractions=(1.0,), sinks=sinks, window=window)
            yield replace(whole, anchor_every=anchor_every)


def solve_fraction(recipe: Recipe, ratio: float, context: int, shape: AttentionShape, dtype: str) -> Recipe | None:
    """Return `recipe` with the largest fraction of pages that meets the ratio, or as it is; None if it can't be met."""
    if recipe.selection != "pages":
        return recipe if meets(recipe, ratio, context, shape, dtype) else None
    pages = regions(context, recipe.sinks, recipe.window).cold // PAGE_TOKENS

    def reading(count: int) -> Recipe:
        return replace(recipe, fractions=(fraction_of(count, pages),))

    if not pages or not meets(reading(1), ratio, context, shape, dtype):
        return None
    if meets(reading(pages), ratio, context, shape, dtype):
        return reading(pages)
    # Except for the rounding to sectors, bytes are linear in the pages read: two points lead close to the answer.
    few, many = (1 / read_ratio(reading(count), [context], shape, dtype) for count in (1, pages))
    guess = 1 + int((1 / ratio - few) / (many - few) * (pages - 1))
    low, high = 1, pages
    for near in (guess - 1, guess + 1):
        if low < near < high:
            low, high = (near, high) if meets(reading(near), ratio, context, shape, dtype) else (low, near)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if meets(reading(middle), ratio, context, shape, dtype) else (low, middle)
    return reading(low)


def fraction_of(count: int, pages: int) -> float:
    """Return the fraction of fewest digits with which `count` of `pages` pages are read."""
    one_over = 1 / (pages // count)
    # Half a page more where the product of a float and the pages would be rounded below the count.
    decimals: Iterator[float] = (
        -(-(2 * count + half) * 10**digits // (2 * pages)) / 10**digits for digits in range(1, 17) for half in (0, 1)
    )
    for fraction in (one_over, *decimals):
        if fraction <= 1 and selected(pages, fraction) == count:
            return fraction
    return count / pages


def largest_ratio_scoring_every_step(
    context: int,
    shape: AttentionShape,
    dtype: str = "bf16",
    sinks: int = DEFAULT_SINKS,
    window: int = DEFAULT_WINDOW,
) -> float:
    """Return the largest C at which every page can still be scored at every step: int4, one page read.

    K's scales are 1/32 of the dense bytes, so it is below 32 at any context.
    """
    return max(read_ratio(recipe, [context], shape, dtype) for recipe in _smallest(sinks, window, (1,)))


def explanation(recipe: Recipe, context: int, shape: AttentionShape, dtype: str = "bf16") -> str:
    """Return a line with the bytes that a recipe reads, its predicted loss, and the ratio if pages are scored every step."""
    loss = predicted_loss(recipe, shape.head_dim)
    text = f"{recipe} reads 1/{read_ratio(recipe, [context], shape, dtype):.2f} of the dense bytes at {context} tokens"
    text += f"; expected loss {loss:.3f}" if loss is not None else ""
    if recipe.selection != "pages":
        return text
    most = largest_ratio_scoring_every_step(context, shape, dtype, recipe.sinks, recipe.window)
    return f"{text}; scoring every step allows up to 1/{most:.2f}"


def check_ratio(ratio: float) -> None:
    """Raise UsageError unless a ratio is from 1 to 1024."""
    if not 1 <= ratio <= MAX_RATIO:
        raise UsageError(f"compress={ratio} is out of range: give a number from 1 to {MAX_RATIO:g}")


def check_context(context: int) -> None:
    """Raise UsageError unless a context is a whole number of tokens from 1 to the largest."""
    if not is_whole(context) or not 1 <= context <= MAX_CONTEXT:
        raise UsageError(f"a context of {context} tokens is out of range: give a whole number from 1 to {MAX_CONTEXT}")


def meets(recipe: Recipe, ratio: float, context: int, shape: AttentionShape, dtype: str) -> bool:
    """Whether a recipe reads at most 1/ratio of the dense bytes."""
    return read_ratio(recipe, [context], shape, dtype) >= ratio


def unmet(
    ratio: float, context: int, shape: AttentionShape, dtype: str, recipes: list[Recipe], remedy: str = UNMET_REMEDY
) -> str:
    """Return the error message for a ratio that none of `recipes`, those of fewest bytes, meets; it ends with `remedy`."""
    best = max(recipes, key=lambda r: read_ratio(r, [context], shape, dtype))
    reached = read_ratio(best, [context], shape, dtype)
    start = holds_from(ratio, context, shape, dtype, recipes)
    outlook = f"it can be met from a context of {start}" if start else f"no context up to {MAX_CONTEXT} meets it"
    least = f"{best.formats} and one page" if best.selection == "pages" else str(best)
    largest = f"the largest ratio is {reached:.2f} ({least})"
    if best.selection == "pages" and best.anchor_every > 1:
        every_step = largest_ratio_scoring_every_step(context, shape, dtype, best.sinks, best.window)
        largest += f", and {every_step:.2f} with the pages scored every step"
    return f"compress={ratio:g} cannot be met at a context of {context}: {largest}; {outlook}; {remedy}"


def holds_from(ratio: float, context: int, shape: AttentionShape, dtype: str, recipes: list[Recipe]) -> int | None:
    """Return the least context from `context` on from which one of `recipes` meets `ratio` throughout; None if none does.

    A page turns cold every 32 tokens, and between two such tokens the ratio falls, so that the last is the worst; but from
    page to page it rises.
    """
    last_of_page = (recipes[0].sinks + recipes[0].window - 1) % PAGE_TOKENS

    def met(n: int) -> bool:
        return any(meets(r, ratio, n, shape, dtype) for r in recipes)

    def seems_met(n: int) -> bool:
        return met(n + (last_of_page - n) % PAGE_TOKENS) and met(n) and met(n + PAGE_TOKENS - 1)

    last = MAX_CONTEXT - PAGE_TOKENS + 1
    if not seems_met(last):
        return None
    low, high = context, last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if seems_met(middle) else (middle, high)
    around = [n for n in range(max(context, high - PAGE_TOKENS), min(last, high + PAGE_TOKENS)) if not met(n)]
    return around[-1] + 1 if around else high


def _smallest(sinks: int, window: int, schedules: tuple[int, ...]) -> list[Recipe]:
    """Return the candidates with the fewest bytes: int4 with one scale per row of V, and one page, at any context."""
    whole = Recipe("int4", "int4", sinks=sinks, window=window)
    pages = replace(whole, selection="pages", fractions=(LEAST_FRACTION,))
    return [*(replace(pages, anchor_every=schedule) for schedule in reversed(schedules)), whole]


def _allotted(
    recipe: Recipe, ratio: float, context: int, shape: AttentionShape, dtype: str, calibration: Calibration
) -> Recipe:
    """Return `recipe` with its pages allotted to the KV heads by a calibration; rounding may cost a page or two."""
    pages = regions(context, recipe.sinks, recipe.window).cold // PAGE_TOKENS
    total = shape.kv_heads * selected(pages, recipe.fractions[0])
    while True:
        counts = allot(calibration, pages, total)
        solved = replace(recipe, fractions=tuple(fraction_of(count, pages) for count in counts))
        if meets(solved, ratio, context, shape, dtype) or total <= shape.kv_heads:
            return solved
        total -= 1
