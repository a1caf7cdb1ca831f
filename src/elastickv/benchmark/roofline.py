"""The roofline score of a contender (Williams, Waterman & Patterson 2009)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from elastickv.backends import Ceilings
from elastickv.recipe import AttentionShape, Recipe, regions
from elastickv.recipe.regions import PAGE_TOKENS, retained_tokens, selected


@dataclass(frozen=True)
class RooflinePoint:
    """One contender under the roofline.

    Attributes
    ----------
    bytes_per_step, flops_per_step : moved and computed.
    intensity_flop_per_byte : their quotient.
    achieved_gflops, attainable_gflops : 10^9 floating-point operations per second; attainable = min(FLOP ceiling, intensity x
        read ceiling).
    bandwidth_gbs : 10^9 bytes moved per second.
    score : achieved / attainable, not capped: above 1 means that the ceiling was measured too low.
    """

    bytes_per_step: float
    flops_per_step: float
    intensity_flop_per_byte: float
    achieved_gflops: float
    attainable_gflops: float
    bandwidth_gbs: float
    score: float


def attention_flops(recipe: Recipe, lengths: Sequence[int], shape: AttentionShape) -> float:
    """Return the floating-point operations of one step: 2 for q.k and 2 for p v per element of every row attended.

    An average over one anchor interval; what scoring pages takes is not counted.
    """
    heads = Counter(map(recipe.fraction, range(shape.kv_heads)))
    ages = range(recipe.anchor_every)
    rows = sum(
        _rows(recipe, length, steps_since_refresh, fraction) * sequences * kv_heads
        for length, sequences in Counter(lengths).items()
        for fraction, kv_heads in heads.items()
        for steps_since_refresh in ages
    )
    return 4 * rows / len(ages) * shape.group * shape.head_dim


def _rows(recipe: Recipe, length: int, steps_since_refresh: int, fraction: float) -> int:
    """Return the rows of one KV head that a step attends to, `steps_since_refresh` steps after an anchor."""
    if recipe.is_dense:
        return length
    split = regions(length, recipe.sinks, recipe.window)
    before = regions(max(length - steps_since_refresh, 0), recipe.sinks, recipe.window).cold
    if recipe.selection == "pages":
        return selected(before // PAGE_TOKENS, fraction) * PAGE_TOKENS + split.cold - before + split.exact
    cold = retained_tokens(split.cold, recipe.stride)
    return (cold - before if steps_since_refresh else cold) + split.exact


def roofline_point(seconds: float, moved_bytes: float, flops: float, ceilings: Ceilings) -> RooflinePoint:
    """Return the roofline point of a step that takes `seconds`."""
    intensity = flops / moved_bytes
    attainable = min(ceilings.flops, intensity * ceilings.read_gbs * 1e9)
    achieved = flops / seconds
    return RooflinePoint(
        moved_bytes, flops, intensity, achieved / 1e9, attainable / 1e9, moved_bytes / seconds / 1e9, achieved / attainable
    )
