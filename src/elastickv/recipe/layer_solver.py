"""Solve for one recipe for each layer by a calibration: the least total error within a budget.

A budget of bytes read (`for_ratio_by_layer`): every layer gets the formats, the rotation and the selection, and every KV head
the share of pages, that minimize error + lambda * bytes; lambda is the smallest at which all layers together stay within the
budget (Everett 1963), and what is left of it goes to more pages. A budget of stored bits (`for_stored_bits`): formats and
rotation alone, with the least error there is.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from numbers import Real
from typing import Any

from elastickv.errors import UsageError
from elastickv.recipe.byte_counts import interval_bytes, page_bytes, stored_bits, stored_ratio
from elastickv.recipe.calibration import GPTQ, ROTATED, HeadErrors, ModelCalibration
from elastickv.recipe.formats import DENSE_BYTES_PER_ELEMENT, PAGE_TOKENS, unread_formats
from elastickv.recipe.knapsack import KnapsackItem, least_cost
from elastickv.recipe.recipe import DEFAULT_SINKS, DEFAULT_WINDOW, DENSE, ROUNDINGS, Recipe, has_page_bounds
from elastickv.recipe.regions import regions, selected
from elastickv.recipe.shape import MAX_CONTEXT, AttentionShape, padded_head_dim
from elastickv.recipe.solver import UNMET_REMEDY, check_context, check_ratio, fraction_of, unmet

_HALVINGS = 44  # of the logarithm of lambda, between these powers of e: to 1e-11 of it
_STORED_SHARE, _MOST_STORED = 0.75, 3.0
_LEAST, _MOST = -80.0, 80.0
_ROTATION_GAIN = 0.9  # share of the error that a rotation may leave: it takes time, and another text changes errors by more


@dataclass(frozen=True)
class LayerPlan:
    """Recipes of a model's layers.

    Attributes
    ----------
    recipes : one for each of `ModelCalibration.layers`, in that order.
    ratio : dense bytes / bytes read, all these layers together, at the context it was solved for; the longest one for
        `for_stored_bits`.
    error : sum of the calibrated errors over layers and heads, in nats a token where they are weighed by sensitivities.
    """

    recipes: tuple[Recipe, ...]
    ratio: float
    error: float


@dataclass(frozen=True)
class _Option:
    """One way to store and read a layer: bytes of a head by fraction, errors by layer, head and fraction.

    `rotate` is that of the recipe, by layer: it changes errors, and no bytes.
    """

    recipe: Recipe
    rotate: tuple[str, ...]
    bytes_at: tuple[float, ...]
    errors_at: tuple[HeadErrors, ...]
    fractions: tuple[float, ...]


@dataclass(frozen=True)
class _Choice:
    """A layer's option and, for each head, which of its fractions is read."""

    option: _Option
    layer: int
    points: tuple[int, ...]

    @property
    def error(self) -> float:
        return sum(self.option.errors_at[point][self.layer][head] for head, point in enumerate(self.points))

    @property
    def n_bytes(self) -> float:
        return sum(self.option.bytes_at[point] for point in self.points)

    @property
    def recipe(self) -> Recipe:
        return self.reading([self.option.fractions[point] for point in self.points])

    def reading(self, fractions: Sequence[float]) -> Recipe:
        """Return the recipe that reads a fraction of the pages of each head."""
        recipe = replace(self.option.recipe, rotate=self.option.rotate[self.layer])
        if not recipe.fractions:
            return recipe
        return replace(recipe, fractions=tuple(fractions[:1] if len(set(fractions)) == 1 else fractions))

    def with_next_pages(self, head: int) -> "_Choice":
        """Return the choice with a head's next larger fraction."""
        return replace(self, points=tuple(point - (number == head) for number, point in enumerate(self.points)))


@dataclass(frozen=True)
class _PageStep:
    """A head's step to its next larger fraction: the error that it saves and the bytes that it takes."""

    layer: int
    head: int
    gain: float
    n_bytes: float


def for_ratio_by_layer(
    calibration: ModelCalibration,
    ratio: float,
    context: int,
    dtype: str = "bf16",
    sinks: int = DEFAULT_SINKS,
    window: int = DEFAULT_WINDOW,
    anchor_every: int | None = None,
    stored: float | None = None,
    select_pages: bool = True,
    device: str | None = None,
    gptq: bool = False,
    remedy: str = UNMET_REMEDY,
) -> LayerPlan:
    """Return the recipes of least calibrated error that together read at most 1/ratio of the dense bytes at `context`.

    Errors are weighed by the sensitivity of the model's predictions to each layer, where the calibration has that of its pages.

    Parameters
    ----------
    dtype : the model's own dtype.
    anchor_every : the steps between anchors where pages are selected; free among the calibrated ones if None.
    stored : formats whose cold tokens take more than 1/stored of the dense bytes are excluded. None: three quarters of
        `ratio`, but at most 3: fewer bytes read should mean fewer bytes stored, and 4 bits with their scales reach 3.2.
    select_pages : whether a recipe may select pages. False: every page is read, and only the formats are chosen.
    device : 'cpu' or 'cuda': formats that its kernels do not read are excluded. None: those that the kernels of either do not.
    gptq : whether a recipe may have `rounding=gptq`, where the calibration measured that it loses less: the CPU's caches can.
    remedy : what the message of a ratio that is not met says to do.

    Raises
    ------
    UsageError : if `ratio` is out of range, no recipes meet it at this context, or `anchor_every` was not calibrated.
    """
    check_ratio(ratio)
    check_context(context)
    if calibration.sensitivity is not None and "pages" in calibration.sensitivity:
        calibration = calibration.in_nats()
    layers = len(calibration.layers)
    group = calibration.query_heads // calibration.kv_heads
    head = AttentionShape(1, group, 1, padded_head_dim(calibration.head_dim))
    dense = layers * calibration.kv_heads * interval_bytes(DENSE, [context], head).kv
    if ratio == 1:
        return LayerPlan((DENSE,) * layers, 1.0, 0.0)
    least = min(_STORED_SHARE * ratio, _MOST_STORED) if stored is None else stored
    options = _options(calibration, context, head, dtype, sinks, window, anchor_every, least, select_pages, device, gptq)
    budget = dense / ratio

    def chosen(byte_weight: float) -> list[_Choice]:
        return [_cheapest(options, layer, byte_weight) for layer in range(layers)]

    low, high = _LEAST, _MOST
    if _bytes(chosen(math.exp(high))) > budget:
        smallest = min(options, key=lambda option: min(option.bytes_at))
        fewest = (
            replace(smallest.recipe, fractions=(min(smallest.fractions),)) if smallest.recipe.fractions else smallest.recipe
        )
        raise UsageError(unmet(ratio, context, head, dtype, [fewest], remedy))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _bytes(chosen(math.exp(middle))) <= budget else (middle, high)
    choices = _filled(chosen(math.exp(high)), chosen(math.exp(low)), budget)
    choices, step = _spent(choices, budget)
    recipes, error, used = [choice.recipe for choice in choices], sum(choice.error for choice in choices), _bytes(choices)
    if step is not None:
        recipes[step.layer], share, more = _partly(choices[step.layer], step, budget - used, context, head, dtype)
        error, used = error - share * step.gain, used + more
    return LayerPlan(tuple(recipes), dense / used, error)


def for_stored_bits(
    calibration: ModelCalibration,
    bits: float,
    dtype: str = "bf16",
    sinks: int = DEFAULT_SINKS,
    window: int = DEFAULT_WINDOW,
    device: str | None = None,
    gptq: bool = False,
) -> LayerPlan:
    """Return the recipes of least calibrated error whose stored bits an element are at most `bits`, mean over the layers.

    Errors are weighed by the sensitivity of the model's predictions to each layer, where the calibration has it.

    Bits are those of cold tokens with their scales and zeros, as `byte_counts.stored_bits` counts them; sinks and window stay
    in 16 bit. Every page is read. No other choice of the calibrated formats has a smaller error within the budget.

    Parameters
    ----------
    dtype : the model's own dtype.
    device : 'cpu' or 'cuda': formats that its kernels do not read are excluded. None: those that the kernels of either do not.
    gptq : as in `for_ratio_by_layer`.

    Raises
    ------
    UsageError : if `bits` is no number above 0 and at most 16, or less than the formats take; the message names the least.
    """
    check_stored_bits(bits)
    calibration = calibration.in_nats()
    layers, head_dim = range(len(calibration.layers)), padded_head_dim(calibration.head_dim)
    head = AttentionShape(1, calibration.query_heads // calibration.kv_heads, 1, head_dim)
    options = _options(calibration, MAX_CONTEXT, head, dtype, sinks, window, None, 0.0, False, device, gptq)
    # Without pages to select, an option is one choice for a layer, whatever a byte weighs.
    choices = [[_cheapest([option], layer, 0.0) for option in options] for layer in layers]
    weights = [page_bytes(option.recipe, head_dim) for option in options]
    groups = [
        [KnapsackItem(weight, choice.error) for weight, choice in zip(weights, of_layer, strict=True)] for of_layer in choices
    ]
    page_elements = 2 * PAGE_TOKENS * head_dim
    # As the user wrote the number: 4.3 is not the float below it.
    chosen = least_cost(groups, math.floor(Fraction(str(float(bits))) * len(layers) * page_elements / 8))
    if chosen is None:
        least = min((option.recipe for option in options), key=lambda recipe: page_bytes(recipe, head_dim))
        lowest = math.ceil(1000 * stored_bits(least, head_dim)) / 1000
        raise UsageError(
            f"stored_bits={bits:g} is less than any calibrated format that {_readers(device)} takes: give {lowest:g} or "
            f"more, which is {least.formats} with its scales in heads of {head_dim}"
        )
    solved = [of_layer[number] for of_layer, number in zip(choices, chosen, strict=True)]
    dense = len(layers) * calibration.kv_heads * interval_bytes(DENSE, [MAX_CONTEXT], head).kv
    return LayerPlan(tuple(c.recipe for c in solved), dense / _bytes(solved), sum(c.error for c in solved))


def check_stored_bits(bits: Any) -> None:
    """Raise UsageError unless a budget of stored bits is a number above 0 and at most 16."""
    most = 8 * DENSE_BYTES_PER_ELEMENT
    number: Any = bits
    if isinstance(number, bool) or not isinstance(number, Real):
        raise UsageError(f"`stored_bits`={bits!r} is not a number: give bits an element, above 0 and at most {most}")
    if not 0 < bits <= most:
        raise UsageError(f"`stored_bits`={bits} is out of range: give bits an element, above 0 and at most {most}")


def _readers(device: str | None) -> str:
    return {"cpu": "the CPU reads", "cuda": "CUDA reads"}.get(device or "", "the CPU and CUDA both read")


def _options(
    calibration: ModelCalibration,
    context: int,
    head: AttentionShape,
    dtype: str,
    sinks: int,
    window: int,
    anchor_every: int | None,
    stored: float,
    select_pages: bool,
    device: str | None,
    gptq: bool,
) -> list[_Option]:
    if anchor_every is not None and anchor_every not in calibration.pages:
        raise UsageError(
            f"anchor_every={anchor_every} was not calibrated: choose {', '.join(map(str, sorted(calibration.pages)))}"
        )
    options, unread = [], unread_formats(device)
    roundings = ROUNDINGS if gptq and calibration.hessians is not None else ROUNDINGS[:1]
    for value, rounding in product(_plain(calibration.values), roundings):
        value_errors, values_rotated = _least(calibration.values, value, rounding)
        name, _, channels = value.partition("/")
        v_group = 0 if int(channels or 0) == head.head_dim else int(channels or 0)
        for key in _plain(calibration.keys):
            if name in unread or key in unread:
                continue
            if rounding != ROUNDINGS[0] and not _measured_so(calibration, key, value):
                continue
            key_errors, keys_rotated = _least(calibration.keys, key, rounding)
            rotate = tuple("k" * k + "v" * v for k, v in zip(keys_rotated, values_rotated, strict=True))
            recipe = Recipe(key, name, value_group=v_group, sinks=sinks, window=window, rounding=rounding)
            if stored_ratio(recipe, [MAX_CONTEXT], head, dtype) < stored:
                continue
            of_formats = _added(key_errors, value_errors)
            n_bytes = interval_bytes(recipe, [context], head, dtype).kv
            options.append(_Option(recipe, rotate, (n_bytes,), (of_formats,), (1.0,)))
            if not select_pages or not has_page_bounds(key):
                continue
            # What a selection loses was measured with unrotated keys. Rotated ones have channels of like ranges, by which pages
            # are hard to tell apart.
            of_formats = _added(_errors(calibration.keys, key, rounding), value_errors)
            rotate = tuple("v" * v for v in values_rotated)
            for steps, curve in calibration.pages.items():
                if anchor_every in (None, steps):
                    by_pages = replace(recipe, selection="pages", fractions=(1.0,), anchor_every=steps)
                    options.append(_pages_option(by_pages, rotate, curve, of_formats, context, head, dtype))
    if not options:
        raise UsageError(f"no calibrated format stores cold tokens in 1/{stored:g} of the dense bytes: ask for less")
    return options


def _plain(errors: Mapping[str, HeadErrors]) -> list[str]:
    """Return the names of formats without a rotation, rounded to the nearest."""
    return [name for name in errors if not name.endswith((ROTATED, GPTQ))]


def _measured_so(calibration: ModelCalibration, key: str, value: str) -> bool:
    """Return whether a calibration has errors of K or of V in a format that is rounded by Hessians."""
    tensors = ((calibration.keys, key), (calibration.values, value))
    return any(name + mark + GPTQ in errors for errors, name in tensors for mark in ("", ROTATED))


def _errors(errors: Mapping[str, HeadErrors], name: str, rounding: str) -> HeadErrors:
    """Return the errors of a format in a rounding; those of the nearest codes, which are larger, if it was not measured."""
    return errors.get(name + GPTQ, errors[name]) if rounding == "gptq" else errors[name]


def _least(errors: Mapping[str, HeadErrors], name: str, rounding: str) -> tuple[HeadErrors, tuple[bool, ...]]:
    """Return the errors of a format, rotated in layers where all heads together gain by it, and in which layers they are."""
    plain = _errors(errors, name, rounding)
    rotated = _errors(errors, name + ROTATED, rounding) if name + ROTATED in errors else plain
    gains = tuple(sum(r) < _ROTATION_GAIN * sum(p) for p, r in zip(plain, rotated, strict=True))
    return tuple(r if gain else p for p, r, gain in zip(plain, rotated, gains, strict=True)), gains


def _pages_option(
    recipe: Recipe,
    rotate: tuple[str, ...],
    curve: Mapping[float, HeadErrors],
    of_formats: HeadErrors,
    context: int,
    head: AttentionShape,
    dtype: str,
) -> _Option:
    fractions = tuple(sorted(curve, reverse=True))
    read = [interval_bytes(replace(recipe, fractions=(f,)), [context], head, dtype).kv for f in fractions]
    return _Option(recipe, rotate, tuple(read), tuple(_added(curve[f], of_formats) for f in fractions), fractions)


def _added(first: HeadErrors, second: HeadErrors) -> HeadErrors:
    return tuple(tuple(a + b for a, b in zip(x, y, strict=True)) for x, y in zip(first, second, strict=True))


def _cheapest(options: Sequence[_Option], layer: int, byte_weight: float) -> _Choice:
    """Return the layer's choice of least error + byte_weight * bytes; of equals the one of fewest bytes."""

    def weighed(option: _Option) -> tuple[float, float, _Option, list[int]]:
        points, cost, n_bytes = [], 0.0, 0.0
        for head in range(len(option.errors_at[0][layer])):
            costs = [errors[layer][head] + byte_weight * b for errors, b in zip(option.errors_at, option.bytes_at, strict=True)]
            point = min(range(len(costs)), key=lambda i: (costs[i], option.bytes_at[i]))
            points.append(point)
            cost, n_bytes = cost + costs[point], n_bytes + option.bytes_at[point]
        return cost, n_bytes, option, points

    _, _, option, points = min(map(weighed, options), key=lambda candidate: candidate[:2])
    return _Choice(option, layer, tuple(points))


def _filled(within: list[_Choice], beyond: list[_Choice], budget: float) -> list[_Choice]:
    """Return `within` with layers of `beyond`, the solution at the next lower weight of a byte, while the budget lasts."""
    choices = list(within)
    for layer, better in enumerate(beyond):
        if _bytes(choices) - choices[layer].n_bytes + better.n_bytes <= budget and better.error < choices[layer].error:
            choices[layer] = better
    return choices


def _spent(choices: list[_Choice], budget: float) -> tuple[list[_Choice], _PageStep | None]:
    """Return choices whose heads read more pages while the budget lasts, and the step of which only a part is left.

    Choices differ by whole layers and by the fractions that were calibrated, and so leave some of the budget. Steps that save
    most error by a byte come first.
    """
    choices, left = list(choices), budget - _bytes(choices)
    while True:
        # Two fractions of few pages may be the same number of them: a step that takes nothing comes first.
        step = max(_next_pages(choices), key=lambda each: each.gain / max(each.n_bytes, 1e-9), default=None)
        if step is None or step.n_bytes > left:
            return choices, step
        choices[step.layer] = choices[step.layer].with_next_pages(step.head)
        left -= step.n_bytes


def _next_pages(choices: Sequence[_Choice]) -> Iterator[_PageStep]:
    """Yield the steps of heads to their next larger fractions that save error."""
    for layer, choice in enumerate(choices):
        errors, n_bytes = choice.option.errors_at, choice.option.bytes_at
        for head, point in enumerate(choice.points):
            if point and errors[point - 1][choice.layer][head] < errors[point][choice.layer][head]:
                gain = errors[point][choice.layer][head] - errors[point - 1][choice.layer][head]
                yield _PageStep(layer, head, gain, n_bytes[point - 1] - n_bytes[point])


def _partly(
    choice: _Choice, step: _PageStep, left: float, context: int, head: AttentionShape, dtype: str
) -> tuple[Recipe, float, float]:
    """Return a layer's recipe with as many more pages of a head as `left` bytes allow, their share of a step, and their bytes.

    The error between two calibrated fractions is taken from the line between theirs.
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


def _bytes(choices: Sequence[_Choice]) -> float:
    return sum(choice.n_bytes for choice in choices)
