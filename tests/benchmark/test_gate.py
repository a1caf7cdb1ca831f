"""Verdicts: pass, fail, or inconclusive where the interval straddles the bound."""

import pytest

from elastickv.benchmark.gate import EXIT_CODES, GATES, Criterion, Gate, Judgement, Verdict, judge
from elastickv.errors import UsageError

GOOD = {"speedup": (1.99, 2.05), "cv": (0.8, 0.8), "efficiency": (75.0, 75.0), "roofline": (0.85, 0.85)}


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({}, "pass"),
        ({"speedup": (1.90, 1.94)}, "fail"),
        ({"speedup": (1.90, 2.00)}, "inconclusive"),
        ({"cv": (1.2, 1.2)}, "fail"),
        ({"efficiency": (69.0, 69.0)}, "fail"),
        ({"roofline": None}, "inconclusive"),
        ({"roofline": None, "cv": (5.0, 5.0)}, "fail"),
    ],
)
def test_golden(change, outcome):
    assert judge(GATES["golden"], GOOD | change, complete=True).outcome == outcome


def test_an_interrupted_run_neither_passes_nor_fails():
    assert judge(GATES["golden"], GOOD, complete=False).outcome == "inconclusive"
    assert judge(GATES["golden"], GOOD | {"cv": (9.0, 9.0)}, complete=False).outcome == "inconclusive"


def test_own_thresholds():
    gate = Gate.parse("speedup>=1.5, cv<=5")
    assert judge(gate, {"speedup": (1.6, 1.7), "cv": (4.0, 4.0)}, True).outcome == "pass"
    assert judge(gate, {"speedup": (1.6, 1.7), "cv": (6.0, 6.0)}, True).outcome == "fail"


@pytest.mark.parametrize("text", ["", "silver", "speedup>2", "speed>=2", "speedup>=x", "speedup>=1e9e", "cv<=5,,"])
def test_what_is_no_gate_is_refused(text):
    with pytest.raises(UsageError, match="`gate`"):
        Gate.parse(text)


def test_exit_codes_are_the_documented_ones():
    assert EXIT_CODES == {"pass": 0, "fail": 1, "inconclusive": 3}


def test_nothing_measured_is_no_pass():
    assert judge(GATES["golden"], {}, complete=True).outcome == "inconclusive"


@pytest.mark.parametrize(
    ("relation", "bounds", "outcome"),
    [
        (">=", (2.0, 3.0), "pass"),
        (">=", (1.9, 2.0), "inconclusive"),
        (">=", (1.9, 1.99), "fail"),
        ("<=", (1.0, 2.0), "pass"),
        ("<=", (2.0, 2.1), "inconclusive"),
        ("<=", (2.01, 2.1), "fail"),
    ],
)
def test_a_bound_that_is_met_exactly_is_met(relation, bounds, outcome):
    assert Criterion("speedup", relation, 2.0).judge(*bounds) == outcome


def test_a_verdict_says_what_was_judged_on_what():
    gate = Gate.parse("speedup>=1.5,cv<=5")
    assert gate.name == "speedup>=1.5,cv<=5"
    judged = (Judgement("speedup>=1.5", "pass", 1.6, 1.7), Judgement("cv<=5", "inconclusive", None, None))
    assert judge(gate, {"speedup": (1.6, 1.7)}, True) == Verdict("speedup>=1.5,cv<=5", "inconclusive", judged)


def test_a_refusal_names_what_is_accepted():
    with pytest.raises(UsageError, match="choose golden, or write bounds on speedup, cv, efficiency, roofline, recipe_error"):
        Gate.parse("silver")
