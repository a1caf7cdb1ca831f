"""Exact bytes of a decode step, read and stored, and the two ratios to the dense bytes.

DRAM sectors (32 bytes) are counted, not requested bytes: every contiguous plane of one (sequence, KV head) is rounded up. Dense
bytes are always 2 bytes per element, on every backend.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from elastickv.recipe.formats import DENSE_BYTES_PER_ELEMENT, FORMATS, Scales, round_up, sectors
from elastickv.recipe.recipe import Recipe
from elastickv.recipe.regions import PAGE_TOKENS, regions, retained_tokens, selected
from elastickv.recipe.shape import AttentionShape

_PLANES = 2  # K and V
_FLOAT_BYTES = 4
LIST_ENTRY_BYTES = 4


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one decode step of one layer moves.

    Attributes
    ----------
    codes : cold rows read, K and V.
    scales : their scales.
    scoring : scales and zeros of all cold pages, which every page scorer reads.
    lists : numbers of the pages read.
    exact : rows of sinks and window read.
    cached : reused outputs and their log-sum-exps read (listed, not counted in C).
    query, output : float32 queries read and outputs written (listed, not counted in C).
    """

    codes: float = 0
    scales: float = 0
    scoring: float = 0
    lists: float = 0
    exact: float = 0
    cached: float = 0
    query: float = 0
    output: float = 0

    @property
    def kv(self) -> float:
        """Bytes read from the KV cache, which C counts."""
        return self.codes + self.scales + self.scoring + self.lists + self.exact

    @property
    def moved(self) -> float:
        """Bytes that the bandwidth figure counts."""
        return self.kv + self.cached + self.query + self.output

    def __add__(self, other: "StepBytes") -> "StepBytes":
        return StepBytes(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> "StepBytes":
        return StepBytes(*(getattr(self, f.name) * factor for f in fields(self)))

    def __truediv__(self, divisor: float) -> "StepBytes":
        return StepBytes(*(getattr(self, f.name) / divisor for f in fields(self)))


def dense_bytes(lengths: Sequence[int], shape: AttentionShape) -> int:
    """Return the KV bytes that a dense 16-bit cache reads in one step of one layer."""
    return sum(lengths) * shape.kv_heads * shape.head_dim * DENSE_BYTES_PER_ELEMENT * _PLANES


def step_bytes(
    recipe: Recipe, lengths: Sequence[int], shape: AttentionShape, model_dtype: str = "bf16", steps_since_refresh: int = 0
) -> StepBytes:
    """Return the bytes of one step over sequences of `lengths` tokens, `steps_since_refresh` steps after an anchor."""
    total = StepBytes()
    # Heads of one fraction read alike.
    ragged = len(recipe.fractions) > 1
    alike = Counter(map(recipe.fraction, range(shape.kv_heads))) if ragged else {recipe.fraction(0): shape.kv_heads}
    for length, times in Counter(lengths).items():
        for fraction, heads in alike.items():
            total += _head_bytes(recipe, length, shape, model_dtype, steps_since_refresh, fraction) * (heads * times)
    per_query = shape.batch * shape.query_heads * shape.head_dim * _FLOAT_BYTES
    return replace(total, query=per_query, output=per_query)


def _head_bytes(
    recipe: Recipe, length: int, shape: AttentionShape, model_dtype: str, steps_since_refresh: int, fraction: float
) -> StepBytes:
    head_dim = shape.head_dim
    split = regions(length, recipe.sinks, recipe.window)
    exact_row = FORMATS[recipe.exact_dtype(model_dtype)].row_bytes(head_dim)
    if recipe.key_format is None or recipe.value_format is None:
        return StepBytes(exact=_PLANES * sectors(length * exact_row))
    rows = retained_tokens(split.cold, recipe.stride)
    at_anchor = regions(length - steps_since_refresh, recipe.sinks, recipe.window).cold
    cached = scoring = lists = 0
    key, value = FORMATS[recipe.key_format], FORMATS[recipe.value_format]
    key_scales, value_scales = key.key_scales(head_dim), value.value_scales(head_dim, recipe.v_group(head_dim))
    scales = sectors(key_scales.bytes_of(rows)) + sectors(value_scales.bytes_of(rows))
    if recipe.selection == "pages":
        listed = selected(at_anchor // PAGE_TOKENS, fraction)
        pages = listed + (split.cold - at_anchor) // PAGE_TOKENS
        rows, lists = pages * PAGE_TOKENS, sectors(listed * LIST_ENTRY_BYTES)
        scales = pages * _selected_scales_bytes(key_scales, value_scales)
        scoring = 0 if steps_since_refresh else sectors(key_scales.bytes_of(split.cold))
    elif steps_since_refresh:
        rows -= at_anchor
        scales = sectors(key_scales.bytes_of(rows)) + sectors(value_scales.bytes_of(rows))
        cached = shape.group * (head_dim + 1) * _FLOAT_BYTES
    return StepBytes(
        codes=sectors(rows * key.key_row_bytes(head_dim)) + sectors(rows * value.row_bytes(head_dim)),
        scales=scales,
        scoring=scoring,
        lists=lists,
        exact=_PLANES * sectors(split.exact * exact_row),
        cached=cached,
    )


def _selected_scales_bytes(key_scales: Scales, value_scales: Scales) -> int:
    """Return the bytes of the scales of a selected page, which are sectors of their own: such pages are not contiguous."""
    return sectors(key_scales.bytes_of(PAGE_TOKENS)) + sectors(value_scales.bytes_of(PAGE_TOKENS))


def selected_page_bytes(recipe: Recipe, head_dim: int) -> int:
    """Return the bytes that a KV head reads of a selected page: codes and scales of K and V.

    Raises
    ------
    ValueError : if the recipe selects no pages.
    """
    if recipe.selection != "pages" or recipe.key_format is None or recipe.value_format is None:
        raise ValueError(f"{recipe} selects no pages")
    key, value = FORMATS[recipe.key_format], FORMATS[recipe.value_format]
    codes = PAGE_TOKENS * (key.key_row_bytes(head_dim) + value.row_bytes(head_dim))  # whole sectors
    return codes + _selected_scales_bytes(key.key_scales(head_dim), value.value_scales(head_dim, recipe.v_group(head_dim)))


def interval_bytes(recipe: Recipe, lengths: Sequence[int], shape: AttentionShape, model_dtype: str = "bf16") -> StepBytes:
    """Return the bytes of a step averaged over one anchor interval at a stated context."""
    total = StepBytes()
    for steps_since_refresh, times in _distinct_ages(recipe, lengths):
        total += step_bytes(recipe, lengths, shape, model_dtype, steps_since_refresh) * times
    return total / recipe.anchor_every


def _distinct_ages(recipe: Recipe, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return pairs (steps since refresh, number of steps that read as much).

    The steps of an interval differ only by the pages that were cold at their anchor.
    """
    first: dict[tuple[int, ...], int] = {}
    times: Counter[int] = Counter()
    for steps_since_refresh in range(recipe.anchor_every):
        at_anchor = (regions(length - steps_since_refresh, recipe.sinks, recipe.window).cold for length in set(lengths))
        times[first.setdefault((min(steps_since_refresh, 1), *at_anchor), steps_since_refresh)] += 1
    return list(times.items())


def read_ratio(recipe: Recipe, lengths: Sequence[int], shape: AttentionShape, model_dtype: str = "bf16") -> float:
    """Return C: dense bytes / recipe bytes read, averaged over one anchor interval."""
    return dense_bytes(lengths, shape) / interval_bytes(recipe, lengths, shape, model_dtype).kv


def largest_step_bytes(recipe: Recipe, lengths: Sequence[int], shape: AttentionShape, model_dtype: str = "bf16") -> StepBytes:
    """Return the bytes of the step of an anchor interval that reads most."""
    ages = (steps_since_refresh for steps_since_refresh, _ in _distinct_ages(recipe, lengths))
    return max(
        (step_bytes(recipe, lengths, shape, model_dtype, steps_since_refresh) for steps_since_refresh in ages),
        key=lambda step: step.kv,
    )


def stored_bytes(recipe: Recipe, lengths: Sequence[int], shape: AttentionShape, model_dtype: str = "bf16") -> int:
    """Return the bytes that hold the tokens of one layer (live rows and scales; spare capacity is not counted)."""
    everything = replace(recipe, fractions=(), selection="all", anchor_every=1) if recipe.fractions else recipe
    total = int(step_bytes(everything, lengths, shape, model_dtype).kv)
    if recipe.selection == "reuse":
        heads = len(lengths) * shape.kv_heads
        total += heads * round_up(shape.group * (shape.head_dim + 1) * _FLOAT_BYTES, _FLOAT_BYTES)
    return total


def page_bytes(recipe: Recipe, head_dim: int) -> int:
    """Return the bytes of a page of cold tokens of one KV head: codes, scales and zeros of K and V.

    Raises
    ------
    ValueError : if the recipe is dense.
    """
    if recipe.key_format is None or recipe.value_format is None:
        raise ValueError(f"{recipe} has no pages")
    key, value = FORMATS[recipe.key_format], FORMATS[recipe.value_format]
    rows = retained_tokens(PAGE_TOKENS, recipe.stride)
    codes = rows * (key.key_row_bytes(head_dim) + value.row_bytes(head_dim))
    scales = (key.key_scales(head_dim), value.value_scales(head_dim, recipe.v_group(head_dim)))
    return codes + sum(each.bytes_of(rows) for each in scales)


def stored_bits(recipe: Recipe, head_dim: int) -> float:
    """Return the bits that an element of a cold token takes with its scales and zeros, mean over K and V; dense: 16."""
    if recipe.is_dense:
        return 8.0 * DENSE_BYTES_PER_ELEMENT
    return 8 * page_bytes(recipe, head_dim) / (_PLANES * PAGE_TOKENS * head_dim)


def stored_ratio(recipe: Recipe, lengths: Sequence[int], shape: AttentionShape, model_dtype: str = "bf16") -> float:
    """Return dense 16-bit bytes / bytes stored."""
    return dense_bytes(lengths, shape) / stored_bytes(recipe, lengths, shape, model_dtype)
