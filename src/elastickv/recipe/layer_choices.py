"""The formats and page fractions chosen for each layer, and how what is left of a budget of bytes is spent on more pages.

`layer_solver` chooses at a given weight of a byte (`cheapest_choice`); the other functions use what those choices leave.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from elastickv.recipe.byte_counts import interval_bytes
from elastickv.recipe.calibration import HeadErrors
from elastickv.recipe.formats import PAGE_TOKENS
from elastickv.recipe.recipe import Recipe
from elastickv.recipe.regions import regions, selected
from elastickv.recipe.shape import AttentionShape
from elastickv.recipe.solver import fraction_of


@dataclass(frozen=True)
class LayerOption:
    """One way to store and read a layer.

    Attributes
    ----------
    recipe : without `rotate`; where it selects pages, its fractions are replaced by those that are chosen.
    rotate : `rotate` of the recipe in each layer. It changes errors, and no bytes.
    stored_ratio : dense bytes / bytes stored of cold tokens.
    bytes_at : bytes that one KV head reads in a step, for each of `fractions`.
    errors_at : errors of each layer's heads, for each of `fractions`.
    fractions : fractions of the cold pages that may be read, the largest first.
    """

    recipe: Recipe
    rotate: tuple[str, ...]
    stored_ratio: float
    bytes_at: tuple[float, ...]
    errors_at: tuple[HeadErrors, ...]
    fractions: tuple[float, ...]


@dataclass(frozen=True)
class LayerChoice:
    """A layer's option and, for each KV head, the index of the fraction that it reads."""

    option: LayerOption
    layer: int
    points: tuple[int, ...]

    @property
    def error(self) -> float:
        """Sum of the errors of the layer's heads."""
        return sum(self.option.errors_at[point][self.layer][head] for head, point in enumerate(self.points))

    @property
    def n_bytes(self) -> float:
        """Bytes that the layer's heads read in a step, all together."""
        return sum(self.option.bytes_at[point] for point in self.points)

    @property
    def recipe(self) -> Recipe:
        """The recipe of the layer."""
        return self.reading([self.option.fractions[point] for point in self.points])

    def reading(self, fractions: Sequence[float]) -> Recipe:
        """Return the layer's recipe with a fraction of the pages for each head."""
        recipe = replace(self.option.recipe, rotate=self.option.rotate[self.layer])
        if not recipe.fractions:
            return recipe
        return replace(recipe, fractions=tuple(fractions[:1] if len(set(fractions)) == 1 else fractions))

    def with_next_pages(self, head: int) -> "LayerChoice":
        """Return the choice with a head's next larger fraction."""
        return replace(self, points=tuple(point - (number == head) for number, point in enumerate(self.points)))


@dataclass(frozen=True)
class PageStep:
    """A head's step to its next larger fraction: the error that it saves and the bytes that it adds."""

    layer: int
    head: int
    gain: float
    n_bytes: float


def cheapest_choice(options: Sequence[LayerOption], layer: int, byte_weight: float) -> LayerChoice:
    """Return the layer's choice of least error + byte_weight * bytes; of equal ones, that of fewest bytes."""

    def weighed(option: LayerOption) -> tuple[float, float, LayerOption, list[int]]:
        points, cost, n_bytes = [], 0.0, 0.0
        for head in range(len(option.errors_at[0][layer])):
            costs = [errors[layer][head] + byte_weight * b for errors, b in zip(option.errors_at, option.bytes_at, strict=True)]
            point = min(range(len(costs)), key=lambda i: (costs[i], option.bytes_at[i]))
            points.append(point)
            cost, n_bytes = cost + costs[point], n_bytes + option.bytes_at[point]
        return cost, n_bytes, option, points

    _, _, option, points = min(map(weighed, options), key=lambda candidate: candidate[:2])
    return LayerChoice(option, layer, tuple(points))


def with_better_layers(within: list[LayerChoice], beyond: list[LayerChoice], budget: float) -> list[LayerChoice]:
    """Return `within` with layers of `beyond`, the solution at the next lower weight of a byte, while the budget lasts."""
    choices = list(within)
    for layer, better in enumerate(beyond):
        if total_bytes(choices) - choices[layer].n_bytes + better.n_bytes <= budget and better.error < choices[layer].error:
            choices[layer] = better
    return choices


def with_more_pages(choices: list[LayerChoice], budget: float) -> tuple[list[LayerChoice], PageStep | None]:
    """Return the choices with more pages while the budget lasts, and the first step that exceeds it (None: none is left).

    Choices differ by whole layers and by calibrated fractions, and so leave some of the budget. The steps that save the most
    error for each byte come first.
    """
    choices, left = list(choices), budget - total_bytes(choices)
    while True:
        # Two fractions of few pages may be the same number of them: a step that takes nothing comes first.
        step = max(_page_steps(choices), key=lambda each: each.gain / max(each.n_bytes, 1e-9), default=None)
        if step is None or step.n_bytes > left:
            return choices, step
        choices[step.layer] = choices[step.layer].with_next_pages(step.head)
        left -= step.n_bytes


def _page_steps(choices: Sequence[LayerChoice]) -> Iterator[PageStep]:
    """Yield the steps of heads to their next larger fractions that save error."""
    for layer, choice in enumerate(choices):
        errors, n_bytes = choice.option.errors_at, choice.option.bytes_at
        for head, point in enumerate(choice.points):
            if point and errors[point - 1][choice.layer][head] < errors[point][choice.layer][head]:
                gain = errors[point][choice.layer][head] - errors[point - 1][choice.layer][head]
                yield PageStep(layer, head, gain, n_bytes[point - 1] - n_bytes[point])


def part_of_step(
    choice: LayerChoice, step: PageStep, left: float, context: int, head: AttentionShape, dtype: str
) -> tuple[Recipe, float, float]:
    """Return a layer's recipe with as many pages of `step` as `left` bytes allow, the share of the step, and the bytes added.

    The share is that of the step's pages, and of its gain: between two calibrated fractions the error is taken to be linear.
    """
    option, point = choice.option, choice.points[step.head]
    pages = regions(context, option.recipe.sinks, option.recipe.window).cold // PAGE_TOKENS
    fewest, most = (selected(pages, option.fractions[each]) for each in (point, point - 1))
    for count in range(fewest + int(left / step.n_bytes * (most - fewest)), fewest, -1):
        fraction = fraction_of(count, pages)
        read = interval_bytes(replace(option.recipe, fractions=(fraction,)), [context], head, dtype).kv
        if (more := read - option.bytes_at[point]) <= left:  # rounded to whole sectors, pages may take more than their share
            fractions = [option.fractions[each] for each in choice.points]
            fractions[step.head] = fraction
            return choice.reading(fractions), (count - fewest) / (most - fewest), more
    return choice.recipe, 0.0, 0.0


def stored_ratio_of(choices: Sequence[LayerChoice]) -> float:
    """Return dense bytes / bytes stored of cold tokens of all layers together."""
    return len(choices) / sum(1 / choice.option.stored_ratio for choice in choices)


def total_bytes(choices: Sequence[LayerChoice]) -> float:
    """Return the bytes that all layers together read in a step."""
    return sum(choice.n_bytes for choice in choices)
