"""What a cache refuses before it changes anything: rows that outgrow it, crops that cannot be, saved numbers that lie."""

import re

import numpy as np
import pytest

from elastickv.errors import UsageError
from elastickv.kvcache.checks import check_crop, check_fractions, check_growth, check_lists, check_shape, cold_tokens
from elastickv.recipe import Recipe


def exactly(message):
    return f"^{re.escape(message)}$"


def counts(*numbers):
    return np.array(numbers, np.int64)


def test_rows_may_grow_to_the_capacity_by_all_new_tokens():
    check_growth(counts(90, 0, 100), counts(10, 10, 0), 10, 100)


def test_a_row_that_takes_more_than_there_is_is_named():
    with pytest.raises(
        UsageError, match=exactly("sequence 1 is to take 11 tokens of 10 that are given: give no more than there are")
    ):
        check_growth(counts(0, 0), counts(10, 11), 10, 100)


def test_a_row_that_outgrows_the_capacity_is_named():
    with pytest.raises(UsageError, match=exactly("the cache is full: sequence 1 holds 91 of 100 tokens, 10 are added")):
        check_growth(counts(90, 91), counts(10, 10), 10, 100)


@pytest.mark.parametrize("after", [(100, 50), (40, 0), (0, 0)])
def test_rows_may_shrink_to_nothing_or_stay(after):
    check_crop(Recipe.parse("int8"), counts(100, 50), counts(*after))


@pytest.mark.parametrize("after", [(100, 51), (101, 50), (-1, 50), (100, -1)])
def test_a_crop_neither_lengthens_a_row_nor_goes_below_nothing(after):
    said = f"a cache of [100, 50] tokens cannot be cropped to {list(after)}: give fewer, from 0 up"
    with pytest.raises(UsageError, match=exactly(said)):
        check_crop(Recipe.parse("int8"), counts(100, 50), counts(*after))


def test_a_crop_may_not_need_what_a_stride_dropped():
    # Behind 4 sinks and before a window of 32, of 100 tokens 64 are cold, of 99 only 32.
    strided = Recipe.parse("int8,stride=2,sinks=4,window=32")
    check_crop(strided, counts(120, 50), counts(100, 40))
    check_crop(Recipe.parse("int8,sinks=4,window=32"), counts(120, 50), counts(99, 40))
    said = f"{strided} has dropped tokens that a crop to [120, 99] needs again: choose another selection"
    with pytest.raises(UsageError, match=exactly(said)):
        check_crop(strided, counts(120, 100), counts(120, 99))


def test_tokens_turn_cold_by_pages_behind_the_window_and_never_where_nothing_is_quantised():
    recipe = Recipe.parse("int8,sinks=4,window=40")
    assert [cold_tokens(recipe, length) for length in (0, 75, 76, 107, 108)] == [0, 0, 32, 32, 64]
    assert cold_tokens(Recipe.parse("dense"), 10_000) == 0


def lists(numbers, listed, fresh, pages):
    """One row and one head: page numbers of which `listed` count, and what there is."""
    return np.array([[numbers]], np.int32), *(np.array([[count]]) for count in (listed, fresh, pages))


@pytest.mark.parametrize(
    ("numbers", "listed", "fresh", "pages"),
    [
        ([0, 4, 7], 3, 8, 9),
        ([0, 4, 7], 3, 8, 8),
        ([0, 1], 2, 2, 2),
        ([-1, 99], 0, 0, 0),
        ([3, 99], 1, 4, 4),
        ([3, -1], 1, 4, 4),
    ],
    ids=[
        "pages turned cold since",
        "none since",
        "every page",
        "none at all",
        "too large behind the end",
        "negative behind it",
    ],
)
def test_lists_of_pages_that_exist_are_accepted(numbers, listed, fresh, pages):
    check_lists(*lists(numbers, listed, fresh, pages))


@pytest.mark.parametrize(
    ("numbers", "listed", "fresh", "pages"),
    [([0, 1], -1, 4, 4), ([0, 1], 2, 1, 4), ([0, 1], 2, 5, 4), ([0, 1], 3, 4, 4)],
    ids=["fewer than none", "more than there were", "from behind the last page", "more than the list has room for"],
)
def test_lists_that_are_longer_than_the_pages_are_refused(numbers, listed, fresh, pages):
    with pytest.raises(ValueError, match=exactly("the saved lists have more pages than the cache")):
        check_lists(*lists(numbers, listed, fresh, pages))


@pytest.mark.parametrize("numbers", [[-1, 0], [0, -1], [0, 4], [5, 0]])
def test_lists_that_name_a_page_that_is_not_there_are_refused(numbers):
    with pytest.raises(ValueError, match=exactly("the saved lists name pages that the cache does not have")):
        check_lists(*lists(numbers, 2, 4, 6))


def test_every_head_of_every_row_is_held_against_its_own_pages():
    numbers = np.array([[[0, 1], [2, 9]], [[5, 6], [7, 8]]], np.int32)
    listed, fresh, pages = np.array([[2, 1], [2, 2]]), np.array([[2, 3], [7, 9]]), np.array([[3], [9]])
    check_lists(numbers, listed, fresh, pages)
    with pytest.raises(ValueError, match="name pages"):
        check_lists(numbers, listed, np.array([[2, 3], [7, 8]]), pages)
    with pytest.raises(ValueError, match="have more pages"):
        check_lists(numbers, listed, fresh, np.array([[3], [8]]))


def test_there_is_a_share_of_the_pages_for_every_head_above_nothing_and_up_to_the_whole():
    check_fractions([1e-9, 0.5, 1.0], 3)
    for bad in ([0.5, 0.0], [0.5, -0.5], [0.5, 1.0000001], [0.5, np.nan], [0.5], [0.5] * 3):
        with pytest.raises(ValueError, match=exactly(f"the shares of the pages are {bad}: 2 above 0 and at most 1 are needed")):
            check_fractions(np.array(bad), 2)


def test_an_array_of_another_shape_is_refused_with_both_shapes():
    check_shape(np.zeros((2, 3), np.float32), (2, 3), "keys")
    with pytest.raises(ValueError, match=exactly("keys of shape (2, 3): (3, 2) is needed")):
        check_shape(np.zeros((2, 3), np.float32), (3, 2), "keys")
