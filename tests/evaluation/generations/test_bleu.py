"""BLEU of token ids, against values computed by hand."""

from math import exp

import pytest

from elastickv.evaluation.generations.bleu import bleu

THE, CAT, IS, ON, MAT, A = range(6)


def test_a_text_that_is_a_reference_scores_one():
    assert bleu([THE, CAT, IS, ON, THE, MAT], [[A, A], [THE, CAT, IS, ON, THE, MAT]]) == pytest.approx(1)


def test_precisions_are_clipped_by_the_reference_that_holds_most():
    """Papineni et al.'s "the the the the the the the": 2 of 7, not 7 of 7."""
    text, references = [THE] * 7, [[THE, CAT, IS, ON, THE, MAT, A], [A, CAT, THE, IS, ON, A, MAT]]
    assert bleu(text, references, longest=1) == pytest.approx(2 / 7)


def test_the_score_is_the_geometric_mean_of_the_precisions():
    """6 tokens: 5 of 6 unigrams, 3 of 5 bigrams, 1 of 4 trigrams; no 4-gram of 3, which counts as 0.1."""
    text, references = [THE, CAT, IS, ON, A, MAT], [[THE, CAT, IS, THE, ON, A]]
    assert bleu(text, references, longest=3) == pytest.approx((5 / 6 * 3 / 5 * 1 / 4) ** (1 / 3))
    assert bleu(text, references) == pytest.approx((5 / 6 * 3 / 5 * 1 / 4 * 0.1 / 3) ** (1 / 4))


def test_a_short_text_is_penalized_by_the_reference_of_the_closest_length():
    """3 tokens against 4 and 9: exp(1 - 4/3). Against 2 and 4, as close, the shorter counts, and nothing is lost."""
    text = [THE, CAT, IS]
    assert bleu(text, [[THE, CAT, IS, ON], [THE] * 9], longest=2) == pytest.approx(exp(1 - 4 / 3))
    assert bleu(text, [[THE, CAT, IS, ON], [CAT, IS]], longest=2) == pytest.approx(1)


def test_n_grams_of_several_references_count_together():
    assert bleu([THE, CAT, IS, ON], [[THE, CAT, A, A], [A, A, IS, ON]], longest=2) == pytest.approx((1 * 2 / 3) ** 0.5)


@pytest.mark.parametrize("text", [[], [A, A]])
def test_a_text_without_a_token_of_the_references_scores_nothing(text):
    assert bleu(text, [[THE, CAT]]) == 0
