"""A verdict against named criteria."""

import re
from dataclasses import dataclass

from elastickv.errors import UsageError

METRICS: dict[str, str] = {
    "speedup": "dense time / elastic time",
    "cv": "coefficient of variation of the elastic time, percent",
    "efficiency": "memory efficiency of the dense baseline, percent",
    "roofline": "roofline score of the elastic step",
    "recipe_error": "mean recipe error on the real sample",
}
EXIT_CODES: dict[str, int] = {"pass": 0, "fail": 1, "inconclusive": 3}


@dataclass(frozen=True)
class Criterion:
    """One bound: `metric` `relation` `threshold`, the relation being '>=' or '<='."""

    metric: str
    relation: str
    threshold: float

    def judge(self, low: float, high: float) -> str:
        """Return 'pass', 'fail' or, where the interval straddles the threshold, 'inconclusive'."""
        if self.relation == "<=":
            low, high, threshold = -high, -low, -self.threshold
        else:
            threshold = self.threshold
        if low >= threshold:
            return "pass"
        return "fail" if high < threshold else "inconclusive"

    def __str__(self) -> str:
        return f"{self.metric}{self.relation}{self.threshold:g}"


@dataclass(frozen=True)
class Gate:
    """Criteria that must all hold."""

    name: str
    criteria: tuple[Criterion, ...]

    @classmethod
    def parse(cls, text: str) -> "Gate":
        """Return the gate called `text`, or the one that its comma-separated bounds spell, such as `speedup>=1.5,cv<=5`.

        Raises
        ------
        UsageError : if it is neither.
        """
        if text in GATES:
            return GATES[text]
        criteria = []
        for term in text.split(","):
            match = re.fullmatch(r"\s*([a-z_]+)\s*(>=|<=)\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*", term)
            if not match or match[1] not in METRICS:
                raise UsageError(
                    f"`gate` {text}: {term!r} is not a criterion; choose {', '.join(GATES)}, or write bounds on "
                    f"{', '.join(METRICS)} such as speedup>=1.5,cv<=5"
                )
            criteria.append(Criterion(match[1], match[2], float(match[3])))
        return cls(text, tuple(criteria))


GATES: dict[str, Gate] = {
    "golden": Gate(
        "golden",
        (
            Criterion("speedup", ">=", 1.95),
            Criterion("cv", "<=", 1.0),
            Criterion("efficiency", ">=", 70.0),
            Criterion("roofline", ">=", 0.80),
        ),
    ),
}


@dataclass(frozen=True)
class Judgement:
    """One criterion's outcome, and the interval it was judged on (a point where there is no interval)."""

    criterion: str
    outcome: str
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Verdict:
    """The outcome of a gate: 'fail' if any criterion fails, else 'inconclusive' if any is, else 'pass'."""

    gate: str
    outcome: str
    criteria: tuple[Judgement, ...]


def judge(gate: Gate, figures: dict[str, tuple[float, float] | None], complete: bool) -> Verdict:
    """Judge `figures` (metric -> bounds, None where it was not measured) against `gate`.

    A run that did not complete is never better than inconclusive.
    """
    judgements = []
    for criterion in gate.criteria:
        bounds = figures.get(criterion.metric)
        outcome = criterion.judge(*bounds) if bounds else "inconclusive"
        judgements.append(Judgement(str(criterion), outcome, *(bounds or (None, None))))
    outcomes = {j.outcome for j in judgements}
    if not complete or outcomes == {"pass", "inconclusive"} or outcomes == {"inconclusive"}:
        overall = "inconclusive"
    else:
        overall = "fail" if "fail" in outcomes else "pass"
    return Verdict(gate.name, overall, tuple(judgements))
