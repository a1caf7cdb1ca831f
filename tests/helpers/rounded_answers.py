"""Answers of engines that compute in bfloat16: near the plain model's, nearest to the one with their own formats and window."""

import numpy as np

from tests.helpers.read_rule import compare, logits_of
from tests.helpers.serving_scenarios import WINDOW

LARGEST_MEAN = 0.35  # of |log-probability difference|, bfloat16 against float64: keys on the edge of a code move codes

LARGEST_GAP = 0.8  # of the logits of the first tokens in which answers part, 0 where none do, on average over the answers


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
    print(f"measured: {own:.4f} from the own rule, {', '.join(f'{other:.4f}' for other in others)} from others")
    assert own < min(others), f"{own:.4f} from the own rule, {others} from others"
    assert own < LARGEST_MEAN, f"{own:.4f} from the own rule"


def gap(model, answer, other):
    """Return how far apart the model's logits are of the first tokens in which two answers to a prompt part; 0: they do not."""
    assert len(answer.tokens) == len(other.tokens)
    differ = [number for number, pair in enumerate(zip(answer.tokens, other.tokens, strict=True)) if pair[0] != pair[1]]
    if not differ:
        return 0.0
    row = logits_of(model, answer)[len(answer.prompt) - 1 + differ[0]]
    return float(abs(row[answer.tokens[differ[0]]] - row[other.tokens[differ[0]]]))


def agree(rounded_rule, answers, others):
    """Assert that answers part where the model is nearly indifferent, by what codes that move can change.

    That can be more than 1 for one answer, and is not for all.
    """
    gaps = [gap(rounded_rule(), *pair) for pair in zip(answers, others, strict=True)]
    print(f"measured: answers part where logits are {', '.join(f'{each:.3f}' for each in gaps)} apart")
    assert np.mean(gaps) < LARGEST_GAP, gaps
