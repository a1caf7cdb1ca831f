"""Scores of answers, by RULER's, SQuAD's and LongBench's rules."""

import numpy as np
import pytest

from elastickv.evaluation.tasks.paired_scores import paired_record
from elastickv.evaluation.tasks.string_match import METRICS


@pytest.mark.parametrize(
    ("metric", "text", "answers", "score"),
    [
        ("all", " 123, and 456.", ["123", "456", "789", "000"], 0.5),
        ("all", "ABCDE\tabc", ["abcde"], 1.0),
        ("part", "It was Berlin, I think.", ["paris", "BERLIN"], 1.0),
        ("part", "Nowhere.", ["paris"], 0.0),
        ("exact", "The  Eiffel Tower!\nIt is in Paris.", ["eiffel tower"], 1.0),
        ("exact", "An Eiffel", ["eiffel tower"], 0.0),
        ("f1", "\n in the city of Paris\nand more", ["Paris"], 0.4),
        ("f1", "Paris", ["Rome", "the Paris"], 1.0),
        ("f1", "", ["Rome"], 0.0),
    ],
)
def test_a_text_scores(metric, text, answers, score):
    assert METRICS[metric](text, answers) == pytest.approx(score)


def test_differences_are_of_the_same_items():
    full, cache = [1, 1, 1, 0, 0.5] * 20, [1, 0, 1, 1, 0.25] * 20
    record = paired_record("C=4", cache, full, {"recipe_hash": "f00d", "compress": 4})
    assert record["score_percent"]["mean"] == pytest.approx(65) and record["difference_points"]["mean"] == pytest.approx(-5)
    low, high = record["difference_points"]["low"], record["difference_points"]["high"]
    # The normal approximation over 100 independent items: 1.96 standard errors.
    half = 196 * np.std(np.subtract(cache, full)) / 10
    assert (low, high) == pytest.approx((-5 - half, -5 + half), abs=1.5)
    assert (record["worse"], record["better"]) == (40, 20) and record["recipe_hash"] == "f00d" and "compress" not in record


def test_without_a_changed_item_the_difference_is_nothing():
    record = paired_record("C=1", [1, 0, 1], [1, 0, 1], {})
    assert record["difference_points"] == {"mean": 0, "low": 0, "high": 0} and (record["worse"], record["better"]) == (0, 0)
