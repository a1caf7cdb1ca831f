"""Pages go to the heads that lose most without them."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.errors import UsageError
from elastickv.recipe import AttentionShape, for_ratio, predicted_loss, read_ratio
from elastickv.recipe.allocation import allot
from tests.helpers.cases import tried

SHAPE = AttentionShape(1, 8, 4, 128)
GRID = (1 / 8, 1 / 4, 1 / 2, 1.0)
UNEVEN = {1.0: [0, 0, 0, 0], 1 / 2: [0.001, 0.1, 0.02, 0], 1 / 4: [0.002, 0.3, 0.05, 0], 1 / 8: [0.003, 0.7, 0.1, 0]}


def convex(drops):
    """Errors at GRID whose steepness falls as the fraction grows."""
    slopes = sorted(drops)
    errors = [0.0]
    for slope, (low, high) in zip(slopes, zip(GRID[::-1][1:], GRID[::-1], strict=False), strict=True):
        errors.append(errors[-1] + slope * (high - low))
    return dict(zip(GRID[::-1], errors, strict=True))


heads = st.lists(st.lists(st.floats(0, 4), min_size=3, max_size=3).map(convex), min_size=1, max_size=3)


def joined(errors, share):
    """The error at a share: lines between the points, and the first of them continued below."""
    for low, high in zip(GRID, GRID[1:], strict=False):
        if share <= high:
            return errors[low] + (errors[high] - errors[low]) * (share - low) / (high - low)
    raise AssertionError


@tried(60)
@given(heads, st.integers(1, 24))
def test_no_other_allotment_of_as_many_pages_errs_less(errors, total):
    pages = 8
    calibration = {fraction: [head[fraction] for head in errors] for fraction in GRID}
    counts = allot(calibration, pages, total)
    spent = min(max(total, len(errors)), pages * len(errors))
    assert sum(counts) == spent and all(1 <= count <= pages for count in counts)

    def error(allotted):
        return sum(joined(head, count / pages) for head, count in zip(errors, allotted, strict=True))

    best = min(error(c) for c in product(range(1, pages + 1), repeat=len(errors)) if sum(c) == spent)
    assert error(counts) <= best + 1e-9


def test_a_calibrated_recipe_keeps_the_budget_and_feeds_the_hungry_head():
    for context in (2048, 32768):
        uniform, ragged = for_ratio(8, context, SHAPE), for_ratio(8, context, SHAPE, calibration=UNEVEN)
        assert len(ragged.fractions) == 4
        assert read_ratio(ragged, [context], SHAPE) >= 8
        assert ragged.fractions[1] > uniform.fractions[0] > ragged.fractions[3]
        assert (ragged.formats, ragged.anchor_every) == (uniform.formats, uniform.anchor_every)
        pages = (context - 132) // 32
        assert sum(int(f * pages) for f in ragged.fractions) >= 4 * int(uniform.fractions[0] * pages) - 8
        assert predicted_loss(ragged, 128) > 0


def test_a_page_is_given_back_where_uneven_lists_take_more_than_even_ones():
    pages = (2048 - 132) // 32
    uniform = for_ratio(8, 2048, SHAPE, anchor_every=4)
    exact = read_ratio(uniform, [2048], SHAPE)
    shares = [int(uniform.fractions[0] * pages)] * 4
    everything = replace(uniform, fractions=tuple(count / pages for count in allot(UNEVEN, pages, sum(shares))))
    assert read_ratio(everything, [2048], SHAPE) < exact
    ragged = for_ratio(exact, 2048, SHAPE, anchor_every=4, calibration=UNEVEN)
    assert read_ratio(ragged, [2048], SHAPE) >= exact
    assert [int(fraction * pages) for fraction in ragged.fractions] == allot(UNEVEN, pages, sum(shares) - 1)


def test_errors_at_shares_of_the_same_page_move_no_page():
    # Of 4 pages both 1/4 and 0.3 are one, so head 0's steep first drop is nothing that a page could buy.
    calibration = {1 / 4: [10, 5], 0.3: [1, 4.8], 1.0: [0.9, 1]}
    assert allot(calibration, 4, 3) == [1, 2]


def test_equal_heads_read_alike():
    calibration = {fraction: [error] * 4 for fraction, error in ((1.0, 0.0), (0.5, 0.1), (0.25, 0.3))}
    counts = allot(calibration, 100, 4 * 25)
    assert sum(counts) == 100


def test_a_head_that_no_page_helps_still_reads_one():
    assert allot(UNEVEN, 64, 64)[3] == 1


def test_without_pages_a_calibration_changes_nothing():
    assert for_ratio(1.5, 8192, SHAPE, calibration=UNEVEN) == for_ratio(1.5, 8192, SHAPE)


@pytest.mark.parametrize(
    ("calibration", "named"),
    [
        ({1.0: [0, 0, 0, 0]}, "two fractions"),
        ({1.0: [0, 0, 0, 0], 0.5: [0, 0]}, "2 errors"),
        ({1.0: [0, 0, 0, 0], 1.5: [0, 0, 0, 0]}, "1.5"),
        ({1.0: [0, 0, 0, 0], 0.5: [0, 0, 0, float("nan")]}, "not finite"),
        ({1.0: [0, 0, 0, 0], 0.5: [0, 0, 0, float("inf")]}, "not finite"),
        ({1.0: [0, 0, 0, 0], 0.5: [0, 0, 0, -1]}, "negative"),
    ],
)
def test_a_calibration_of_other_heads_is_refused(calibration, named):
    with pytest.raises(UsageError, match=named):
        for_ratio(8, 8192, SHAPE, calibration=calibration)


def test_what_lies_beyond_the_largest_calibrated_share_is_handed_out_too():
    half = {1 / 4: [0.3, 0.3], 1 / 2: [0.1, 0.2]}
    assert allot(half, 8, 16) == [8, 8]
    assert allot(half, 8, 11) == [7, 4]
    assert allot(half, 8, 100) == [8, 8]
    assert allot(half, 0, 5) == [0, 0]
