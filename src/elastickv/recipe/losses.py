"""The predicted loss of a recipe: figures measured on a real model, interpolated so that less is never better.

`losses.json` is written by benchmarks/recipe_study.py and says of which model, text and inputs it is. A loss is the root mean
square, over layers, heads and queries, of the recipe error: relative L2 of a head's output against dense attention on the
unquantized keys and values. Squares, because KL divergence and perplexity grow with the square of an error, and because squares
of independent errors add up. The order of recipes holds for other models better than the figures do.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from elastickv.recipe.recipe import Recipe

LOSSES_PATH = Path(__file__).with_name("losses.json")
_SIXTEEN_BIT = ("bf16", "fp16")


@dataclass(frozen=True)
class Losses:
    """Measured losses.

    Attributes
    ----------
    formats : loss by (key format, value format, channels of V to an int4 scale or 0), everything read.
    pages : anchor_every -> ((fraction, loss), ...) by falling fraction, in 16 bit.
    nothing : loss of reading no cold page at all.
    """

    formats: dict[tuple[str, str, int], float]
    pages: dict[int, tuple[tuple[float, float], ...]]
    nothing: float

    def of_formats(self, key: str, value: str, group: int) -> float | None:
        """Return the loss of storing K and V so and reading all of it; None where it was not measured.

        `group` channels of V share a scale.
        """
        key, value = ("bf16" if name in _SIXTEEN_BIT else name for name in (key, value))
        groups = sorted(g for k, v, g in self.formats if (k, v) == (key, value))
        if not groups:
            return None
        if groups == [0]:
            return self.formats[key, value, 0]
        points = [(math.log2(g), self.formats[key, value, g]) for g in groups]
        return _interpolated(math.log2(group), _never_falling(points))

    def of_pages(self, fraction: float, anchor_every: int) -> float:
        """Return the loss of reading a share of the cold pages, selected every `anchor_every` steps."""
        x, schedules = math.log2(anchor_every), sorted(self.pages)
        losses = [_interpolated(-math.log2(fraction), self._curve(r)) for r in schedules]
        points = [(math.log2(r), loss) for r, loss in zip(schedules, losses, strict=True)]
        return min(self.nothing, _interpolated(x, _never_falling(points)))

    def _curve(self, anchor_every: int) -> list[tuple[float, float]]:
        return _never_falling([(0.0, 0.0), *((-math.log2(f), loss) for f, loss in self.pages[anchor_every])])


def _never_falling(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return points of rising x with every y raised to the largest before it: noise must not make a larger step look better."""
    return list(zip((x for x, _ in points), accumulate((y for _, y in points), max), strict=True))


def _interpolated(x: float, points: Sequence[tuple[float, float]]) -> float:
    """Return y at x on the line through the two points around it; outside, on the line through the nearest two."""
    if x <= points[0][0]:
        return points[0][1]
    after = next((i for i, (at, _) in enumerate(points) if at >= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@lru_cache(maxsize=1)
def measured() -> Losses:
    """Return the shipped figures."""
    record = json.loads(LOSSES_PATH.read_text(encoding="utf-8"))
    formats = {}
    for name, loss in record["formats"].items():
        key, value = (part.partition("=")[2] for part in name.split(","))
        value, _, group = value.partition("/")
        formats[key, value, int(group or 0)] = loss
    pages = {int(r): tuple((float(f), float(loss)) for f, loss in curve) for r, curve in record["pages"].items()}
    return Losses(formats, pages, record["nothing"])


def predicted_loss(recipe: Recipe, head_dim: int) -> float | None:
    """Return the recipe error to expect, root mean square over layers, heads and queries; None where none was measured.

    Errors of quantization and of selection are independent, so their squares add up (benchmarks/NOTES.md). The solver
    never chooses `stride`, `reuse` and rotations: they have no prediction.
    """
    if recipe.key_format is None or recipe.value_format is None:
        return 0.0
    if recipe.selection not in ("all", "pages") or recipe.rotate:
        return None
    table = measured()
    rounding = table.of_formats(recipe.key_format, recipe.value_format, recipe.v_group(head_dim))
    if recipe.selection == "all" or rounding is None:
        return rounding
    squares = [table.of_pages(fraction, recipe.anchor_every) ** 2 for fraction in recipe.fractions]
    return math.sqrt(rounding**2 + sum(squares) / len(squares))
