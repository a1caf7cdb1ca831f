"""Two sets of results compared: verdicts cell by cell, without the texts that they are shown as."""

from dataclasses import dataclass, field
from typing import Any

from elastickv.benchmark.gate import EXIT_CODES, Criterion
from elastickv.results.compare.change import Row

VERDICTS = ("SAME", "FASTER", "SLOWER", "AMBIGUOUS")


@dataclass(frozen=True)
class ComparisonData:
    """Two sets of results, cell by cell.

    Attributes
    ----------
    a, b : what was compared: B is judged against A.
    margin_percent, fidelity_margin_percent : changes within them are none.
    rows : every figure of every cell that both sides measured.
    only_a, only_b : cells that one side alone measured, and why where its file says so.
    warnings : what a reader must know before believing it.
    """

    a: str
    b: str
    margin_percent: float
    fidelity_margin_percent: float
    rows: list[Row]
    only_a: dict[str, str] = field(default_factory=dict)
    only_b: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def outcome(self, fail_on: str) -> str:
        """Return 'pass', 'fail' or 'inconclusive': whether B is a regression.

        Parameters
        ----------
        fail_on : 'slower', 'fidelity', or 'any' of both.

        A cell of A that B lacks, an interval that reaches over the margin and an error that was not measured are inconclusive.
        """
        outcomes = set()
        if fail_on in ("slower", "any"):
            bound = Criterion("time", "<=", 1 + self.margin_percent / 100)
            outcomes |= {bound.judge(row.ratio.low, row.ratio.high) if row.ratio else "inconclusive" for row in self.rows}
        if fail_on in ("fidelity", "any"):
            judged = {"WORSE": "fail", "UNKNOWN": "inconclusive"}
            outcomes |= {judged.get(row.fidelity.verdict, "pass") for row in self.rows}
        if self.only_a:
            outcomes.add("inconclusive")
        return max(outcomes, key=("pass", "inconclusive", "fail").index)

    def exit_code(self, fail_on: str | None) -> int:
        """Return 0, 1 for a regression or 3 for inconclusive; 0 where nothing is to fail."""
        return 0 if fail_on is None else EXIT_CODES[self.outcome(fail_on)]

    def counts(self) -> dict[str, int]:
        """Return how many rows each verdict has."""
        verdicts = [row.verdict for row in self.rows]
        return {verdict: verdicts.count(verdict) for verdict in VERDICTS}

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {
            "kind": "elastickv-comparison",
            "version": 1,
            **{name: getattr(self, name) for name in ("a", "b", "margin_percent", "fidelity_margin_percent")},
            "counts": self.counts(),
            "rows": [row.as_dict() for row in self.rows],
            **{name: getattr(self, name) for name in ("only_a", "only_b", "warnings")},
        }
