"""How much a text repeats itself."""

import pytest

from elastickv.evaluation.generations.repetition import ends_in_loop, repetition_rate


@pytest.mark.parametrize(
    ("ids", "length", "rate"),
    [
        ([1, 2, 3, 4, 5, 6], 4, 0),
        ([1, 2, 1, 2, 1], 2, 1 / 2),  # 12 21 12 21: two of four are new
        ([7] * 103, 4, 99 / 100),
        ([1, 2, 3], 4, 0),
        ([], 1, 0),
    ],
)
def test_the_rate_is_the_share_of_n_grams_that_occurred_before(ids, length, rate):
    assert repetition_rate(ids, length) == pytest.approx(rate)


def test_a_text_that_loops_at_its_end_is_told_from_one_that_does_not():
    whole = list(range(400))
    looping = [*range(300), *([5, 6, 7] * 34)]
    assert ends_in_loop(looping) and not ends_in_loop(whole)
    assert repetition_rate(looping) < 0.3, "the rate of the whole text hardly tells"


def test_a_text_that_returns_to_its_beginning_does_not_loop():
    assert not ends_in_loop([*range(300), *range(100)])
