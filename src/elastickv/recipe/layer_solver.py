"""Solve for one recipe for each layer by a calibration: the least total error within a budget.

A budget of bytes read (`for_ratio_by_layer`): every layer gets the formats, the rotation and the selection, and every KV head
the share of pages, that minimize error + lambda * bytes; lambda is the smallest at which all layers together stay within the
budget (Everett 1963), and what is left of it goes to more pages. A budget of stored bits (`for_stored_bits`): formats and
rotation alone, with the least error there is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice, product
from numbers import Real
from typing import Any

from elastickv.errors import UsageError
from elastickv.recipe.byte_counts import interval_bytes, page_bytes, stored_bits, stored_ratio
from elastickv.recipe.calibration import GPTQ, ROTATED, HeadErrors, ModelCalibration
from elastickv.recipe.formats import DENSE_BYTES_PER_ELEMENT, PAGE_TOKENS, unread_formats
from elastickv.recipe.knapsack import KnapsackItem, least_cost
from elastickv.recipe.layer_choices import (
    LayerChoice,
    LayerOption,
    cheapest_choice,
    part_of_step,
    stored_ratio_of,
    total_bytes,
    with_better_layers,
    with_more_pages,
)
from elastickv.recipe.recipe import DEFAULT_SINKS, DEFAULT_WINDOW, DENSE, ROUNDINGS, Recipe, has_page_bounds
from elastickv.recipe.shape import MAX_CONTEXT, AttentionShape, padded_head_dim
from elastickv.recipe.solver import UNMET_REMEDY, check_context, check_ratio, unmet

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


def for_ratio_by_layer(
    calibration: ModelCalibration,
    ratio: float,
    context: int,
    dtype: str = "bf16",
    sinks: int = DEFAULT_SINKS,
    window: int = DEFAULT_WINDOW,
    anchor_every: int | None = None,
    stored: float | None = None,
    stored_by_layer: bool = False,
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
    stored : the cold tokens of all layers together take at most 1/stored of the dense bytes. None: three quarters of `ratio`,
        but at most 3: fewer bytes read should mean fewer bytes stored, and 4 bits with their scales reach 3.2.
    stored_by_layer : whether each layer meets `stored` by itself, as where the pages of all layers have one size.
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
    budget = dense / ratio
    options = _options(calibration, context, head, dtype, sinks, window, anchor_every, select_pages, device, gptq)
    stored_ratios = {option.stored_ratio for option in options}
    if max(stored_ratios) < least:
        raise UsageError(f"no calibrated format stores cold tokens in 1/{least:g} of the dense bytes: ask for less")

    def chosen(limit: float) -> list[LayerChoice]:
        return _within_budget([option for option in options if option.stored_ratio >= limit], layers, budget)

    # The loosest limit to each layer with which all of them together store few enough bytes, and `least` itself: a looser one
    # does not always leave smaller errors.
    looser = () if stored_by_layer else sorted(each for each in stored_ratios if each < least)
    together = (choices for choices in map(chosen, looser) if stored_ratio_of(choices) >= least)
    solved = [choices for choices in (*islice(together, 1), chosen(least)) if total_bytes(choices) <= budget]
    if not solved:
        raise UsageError(unmet(ratio, context, head, dtype, [_reading_least(options)], remedy))
    plans = [_with_pages(choices, dense, ratio, context, head, dtype) for choices in solved]
    return min(plans, key=lambda plan: plan.error)


def _with_pages(
    choices: list[LayerChoice], dense: float, ratio: float, context: int, head: AttentionShape, dtype: str
) -> LayerPlan:
    """Return the plan that spends what `choices` leave of `dense` / `ratio` bytes on more pages."""
    budget = dense / ratio
    choices, step = with_more_pages(choices, budget)
    recipes, error, used = [choice.recipe for choice in choices], sum(choice.error for choice in choices), total_bytes(choices)
    if step is not None:
        recipes[step.layer], share, more = part_of_step(choices[step.layer], step, budget - used, context, head, dtype)
        error, used = error - share * step.gain, used + more
    return LayerPlan(tuple(recipes), dense / used, error)


def _within_budget(options: Sequence[LayerOption], layers: int, budget: float) -> list[LayerChoice]:
    """Return the layers' choices of least error that read at most `budget` bytes, or those of fewest bytes if none do."""

    def chosen(byte_weight: float) -> list[LayerChoice]:
        return [cheapest_choice(options, layer, byte_weight) for layer in range(layers)]

    low, high = _LEAST, _MOST
    fewest = chosen(math.exp(high))
    if total_bytes(fewest) > budget:
        return fewest
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if total_bytes(chosen(math.exp(middle))) <= budget else (middle, high)
    return with_better_layers(chosen(math.exp(high)), chosen(math.exp(low)), budget)


def _reading_least(options: Sequence[LayerOption]) -> Recipe:
    """Return the recipe that reads the fewest bytes."""
    option = min(options, key=lambda option: min(option.bytes_at))
    return replace(option.recipe, fractions=(min(option.fractions),)) if option.recipe.fractions else option.recipe


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
    options = _options(calibration, MAX_CONTEXT, head, dtype, sinks, window, None, False, device, gptq)
    # Without pages to select, an option is one choice for a layer, whatever a byte weighs.
    choices = [[cheapest_choice([option], layer, 0.0) for option in options] for layer in layers]
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
    return LayerPlan(tuple(c.recipe for c in solved), dense / total_bytes(solved), sum(c.error for c in solved))


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
    select_pages: bool,
    device: str | None,
    gptq: bool,
) -> list[LayerOption]:
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
            of_formats = _added(key_errors, value_errors)
            stored = stored_ratio(recipe, [MAX_CONTEXT], head, dtype)
            n_bytes = interval_bytes(recipe, [context], head, dtype).kv
            options.append(LayerOption(recipe, rotate, stored, (n_bytes,), (of_formats,), (1.0,)))
            if not select_pages or not has_page_bounds(key):
                continue
            # What a selection loses was measured with unrotated keys. Rotated ones have channels of like ranges, by which pages
            # are hard to tell apart.
            of_formats = _added(_errors(calibration.keys, key, rounding), value_errors)
            rotate = tuple("v" * v for v in values_rotated)
            for steps, curve in calibration.pages.items():
                if anchor_every in (None, steps):
                    by_pages = replace(recipe, selection="pages", fractions=(1.0,), anchor_every=steps)
                    options.append(_pages_option(by_pages, rotate, stored, curve, of_formats, context, head, dtype))
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
    stored: float,
    curve: Mapping[float, HeadErrors],
    of_formats: HeadErrors,
    context: int,
    head: AttentionShape,
    dtype: str,
) -> LayerOption:
    fractions = tuple(sorted(curve, reverse=True))
    read = [interval_bytes(replace(recipe, fractions=(f,)), [context], head, dtype).kv for f in fractions]
    return LayerOption(recipe, rotate, stored, tuple(read), tuple(_added(curve[f], of_formats) for f in fractions), fractions)


def _added(first: HeadErrors, second: HeadErrors) -> HeadErrors:
    return tuple(tuple(a + b for a, b in zip(x, y, strict=True)) for x, y in zip(first, second, strict=True))
