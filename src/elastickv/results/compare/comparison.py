"""Two sets of results compared, cell by cell: B's times and errors against A's."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from elastickv.benchmark.gate import EXIT_CODES, Criterion
from elastickv.errors import UsageError
from elastickv.inputs import file_path
from elastickv.results.compare.change import NO_CONTROL, RUNS_FOR_SPREAD, Row, change
from elastickv.results.compare.comparison_table import FORMATS, as_html, flat
from elastickv.results.compare.matching import comparability_warnings, match
from elastickv.results.compare.result_sets import cells_by_name, read_result_set
from elastickv.results.files import SUFFIXES, write_text
from elastickv.results.formats.plain_json import dumps
from elastickv.results.formats.rows import frame
from elastickv.results.kinds.sweep_record import MISSING

CONTROLS = ("dense", "none")
FAIL_ON = ("slower", "fidelity", "any")
_LEFT_OUT = 2  # exit code: invalid input
VERDICTS = ("SAME", "FASTER", "SLOWER", "AMBIGUOUS")


@dataclass(frozen=True)
class Comparison:
    """Two sets of results, cell by cell; shown as a table in a notebook.

    Attributes
    ----------
    a, b : what was compared: B is judged against A.
    margin_percent, fidelity_margin_percent : changes within them are none.
    rows : every figure of every cell that both A and B measured.
    only_a, only_b : cells that only A or only B measured, and the reason where the file has one.
    warnings : what limits the comparison.
    incomplete : a sentence for each sweep of A or B that lacks cells of its plan.
    missing : the cells that they lack.
    unreadable : why a file of A or B was left out, a line each.
    """

    a: str
    b: str
    margin_percent: float
    fidelity_margin_percent: float
    rows: list[Row]
    only_a: dict[str, str] = field(default_factory=dict)
    only_b: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def outcome(self, fail_on: str) -> str:
        """Return 'pass', 'fail' or 'inconclusive': whether B is a regression.

        Parameters
        ----------
        fail_on : 'slower', 'fidelity', or 'any' of both.

        A cell of A that B lacks, a sweep on either side that lacks cells of its plan, a file that cannot be read, an interval
        that reaches over the margin and an error that was not measured are inconclusive.
        """
        outcomes = set()
        if fail_on in ("slower", "any"):
            bound = Criterion("time", "<=", 1 + self.margin_percent / 100)
            outcomes |= {bound.judge(row.ratio.low, row.ratio.high) if row.ratio else "inconclusive" for row in self.rows}
        if fail_on in ("fidelity", "any"):
            judged = {"WORSE": "fail", "UNKNOWN": "inconclusive"}
            outcomes |= {judged.get(row.fidelity.verdict, "pass") for row in self.rows}
        if self.only_a or self.incomplete or self.unreadable:
            outcomes.add("inconclusive")
        return max(outcomes, key=("pass", "inconclusive", "fail").index)

    def exit_code(self, fail_on: str | None) -> int:
        """Return 1 for a regression; else 2 if a file was left out, 3 for inconclusive, and 0 where nothing is to fail."""
        code = 0 if fail_on is None else EXIT_CODES[self.outcome(fail_on)]
        return _LEFT_OUT if self.unreadable and code != EXIT_CODES["fail"] else code

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
            **{name: getattr(self, name) for name in ("only_a", "only_b", "warnings", "incomplete", "missing", "unreadable")},
        }

    def to_json(self) -> str:
        """Return it as indented JSON."""
        return dumps(self.as_dict())

    def to_pandas(self) -> Any:
        """Return one row a figure of a cell, as a `pandas.DataFrame`.

        Raises
        ------
        UsageError : if pandas is not installed.
        """
        return frame([flat(row) for row in self.rows])

    def save(self, path: Path | str) -> None:
        """Write the comparison; the suffix names the format: .json, .jsonl, .csv, .md, .html or .txt, anything else is JSON.

        Raises
        ------
        UsageError : if it cannot be written.
        """
        write_text(file_path(path), FORMATS[SUFFIXES.get(file_path(path).suffix.lower(), "json")](self))

    def _repr_html_(self) -> str:
        return as_html(self)


def compare(
    a: Any,
    b: Any,
    *,
    margin_percent: float = 3.0,
    fidelity_margin_percent: float = 2.0,
    control: str = "dense",
    allow_different_device: bool = False,
) -> Comparison:
    """Compare B with A, cell by cell.

    Parameters
    ----------
    a, b : a path of a result, a sweep or a folder; a result; or several of either. B is compared with A.
    margin_percent : times within it are the same.
    fidelity_margin_percent : recipe errors within it are the same.
    control : 'dense' divides each time by that of the dense contender measured in turns with it, which removes drift of
        the machine; 'none' compares the plain times.
    allow_different_device : compare results of different devices, by their plain times.

    Raises
    ------
    UsageError : naming what cannot be compared, or cannot be read if nothing else is there.
    """
    for name, margin in (("margin", margin_percent), ("fidelity margin", fidelity_margin_percent)):
        if not isinstance(margin, (int, float)) or not 0 < margin < 100:
            raise UsageError(f"a {name} of {margin} % is out of range: above 0 and below 100 is accepted")
    if control not in CONTROLS:
        raise UsageError(f"control {control} is unknown: choose {', '.join(CONTROLS)}")
    results_a, results_b = read_result_set(a, "A"), read_result_set(b, "B")
    matched = match(results_a, results_b, allow_different_device)
    controlled = control == "dense" and not matched.other_device
    margins = margin_percent, fidelity_margin_percent
    rows = [change(pair.cell, figure, pair.a, pair.b, margins, controlled) for pair in matched.pairs for figure in pair.figures]
    sides = (results_a, results_b)
    if not rows:
        raise UsageError(f"{results_a.name} and {results_b.name} have no figure in common: compare results of one command")
    incomplete = list(dict.fromkeys(sentence for side in sides for sentence in side.incomplete))
    unmeasured = [cell for side in sides for cell in side.unmeasured]
    unreadable = list(dict.fromkeys(reason for side in sides for reason in side.refusals))
    warnings = [
        *(f"left out: {reason}" for reason in unreadable),
        *incomplete,
        *dict.fromkeys(note for side in sides for note in side.notes),
        *comparability_warnings(matched),
        *_about_control(rows, controlled, margin_percent),
        *_about_repetitions(rows),
    ]
    return Comparison(
        a=results_a.name,
        b=results_b.name,
        margin_percent=margin_percent,
        fidelity_margin_percent=fidelity_margin_percent,
        rows=rows,
        only_a=matched.only_a,
        only_b=matched.only_b,
        warnings=warnings,
        incomplete=incomplete,
        missing=list(cells_by_name(cell for cell in dict.fromkeys(unmeasured) if cell.status == MISSING)),
        unreadable=unreadable,
    )


def _about_control(rows: list[Row], controlled: bool, margin_percent: float) -> Iterator[str]:
    apart = sum(row.why == NO_CONTROL for row in rows)
    if apart:
        yield (
            f"{apart} of {len(rows)} figures were measured against different dense contenders, so that a change cannot be told "
            "from the machine's drift: measure both sides with --dense bf16; --control none judges times as they stand"
        )
    alone = sum(row.ratio is not None and row.control is None for row in rows)
    if controlled and alone:
        yield (
            f"{alone} of {len(rows)} figures come without samples of a dense contender: their times are judged as they stand, "
            "and what the machine did between the two runs is in them"
        )
    drifts = [row.drift for row in rows if row.drift is not None]
    if drifts and not 1 / (1 + margin_percent / 100) <= median(drifts) <= 1 + margin_percent / 100:
        yield (
            f"dense takes {median(drifts):.3f} times as long in B as in A (median), which is taken for the machine's doing and "
            "left out of the ratios; a change that slows dense and elastic alike shows with --control none"
        )


def _about_repetitions(rows: list[Row]) -> Iterator[str]:
    few = sum(row.verdict in ("SLOWER", "FASTER") and min(len(row.a), len(row.b)) < RUNS_FOR_SPREAD for row in rows)
    if few:
        yield (
            f"{few} of {len(rows)} verdicts rest on fewer than {RUNS_FOR_SPREAD} runs of a side: their intervals cover the "
            "spread within a run, not from one run to the next, which can be larger; measure both sides "
            f"{RUNS_FOR_SPREAD} times or more"
        )
