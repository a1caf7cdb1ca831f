"""Answers of engines that compute in bfloat16: near the plain model's, nearest to the one with their own formats and window."""

import numpy as np

from tests.helpers.read_rule import compare, disagreement, logits_of
from tests.helpers.serving_scenarios import WINDOW

LARGEST_MEAN = 0.35  # of |log-probability difference|, bfloat16 against float64: keys on the edge of a code move codes

LARGEST_GAP = 1.5  # of the logits of two tokens between which the engine may choose either


def distance(model, answers, window_first=True):
    """Return the mean |difference| of log-probabilities between answers and a plain model."""
    differences = []
    for answer in answers:
        logits = logits_of(model, answer) if window_first else model.logits(answer.sequence)
        differences.append(compare(logits, len(answer.prompt), answer.tokens, answer.logprobs)[1])
    return float(np.concatenate(differences).mean())


def follow(rounded_rule, answers, recipe="int4"):
    """Assert that answers are nearest to the plain model with their own formats and window.

    What int8 changes is less than what bfloat16 does: answers by it are told from int4's alone.
    """
    own, others = distance(rounded_rule(recipe), answers), []
    if recipe == "int4":
        others = [distance(rounded_rule(recipe, WINDOW + shift), answers) for shift in (-32, 32)]
    others += [distance(rounded_rule(other), answers) for other in (("int8", None) if recipe == "int4" else ("int4",))]
    assert own < min(others), f"{own:.4f} from the own rule, {others} from others"
    assert own < LARGEST_MEAN, f"{own:.4f} from the own rule"


def agree(rounded_rule, answers, others):
    """Assert that two answers part only where the model is nearly indifferent, by what codes that move can change."""
    assert [disagreement(rounded_rule(), *pair, tie=LARGEST_GAP) for pair in zip(answers, others, strict=True)] == [None] * len(
        answers
    )
