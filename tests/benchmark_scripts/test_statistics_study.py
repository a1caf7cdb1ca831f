"""The interval's calibration in small: benchmarks/statistics_study.py with fewer replications, and its result file."""

import json
import math
from pathlib import Path

import pytest

from benchmarks.statistics_study import OWN, PAIRED, UNPAIRED, Condition, conditions, rates
from elastickv.benchmark.stats import location

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "reliability" / "statistics.json"
REPLICATIONS = 400
CHECKED = [
    Condition(PAIRED, "noise", 10, 1.0),
    Condition(PAIRED, "drift of 170 %", 20, 1.03),
    Condition(PAIRED, "two clocks, slow", 50, 1.0),
    Condition(PAIRED, "Pareto bursts, 10 %", 20, 1.0),
    Condition(PAIRED, "drift, two clocks, bursts, AR(1) 0.9", 50, 1.5),
    Condition(OWN, "AR(1), 0.6", 50, 1.0),
    Condition(UNPAIRED, "Pareto bursts, 5 %", 50, 1.0),
    Condition(UNPAIRED, "lognormal, sigma 1.5", 100, 1.0),
    Condition(UNPAIRED, "AR(1), 0.6", 100, 1.0),
]


def within(coverage, low=0.93, high=0.97, replications=REPLICATIONS):
    """Whether a true coverage between `low` and `high` would be seen so, but for once in 2000 times."""
    slack = [3.3 * math.sqrt(p * (1 - p) / replications) for p in (low, high)]
    return low - slack[0] <= coverage <= high + slack[1]


@pytest.mark.parametrize("condition", CHECKED, ids=lambda c: f"{c.kind} {c.stream} {c.samples}")
def test_the_interval_holds_the_truth_as_often_as_it_says(condition):
    measured = rates(condition, REPLICATIONS)
    assert within(measured.coverage)
    if condition.ratio == 1:
        assert measured.faster <= 0.025 + 3.3 * math.sqrt(0.025 * 0.975 / REPLICATIONS)
    if condition.ratio == 1 and measured.beyond_noise is not None:
        assert measured.beyond_noise <= 0.025


# What each part is for: without it the study finds out.
@pytest.mark.parametrize(
    ("part", "replacement", "condition"),
    [
        ("_first_autocorrelation", lambda series: 0.0, Condition(OWN, "AR(1), 0.6", 50, 1.0)),
        ("_block_means", lambda series, length, lead=0: series, Condition(PAIRED, "drift of 170 %", 20, 1.0)),
    ],
)
def test_without_a_part_of_the_estimator_it_does_not(monkeypatch, part, replacement, condition):
    monkeypatch.setattr(location, part, replacement)
    assert not within(rates(condition, REPLICATIONS).coverage)


def test_the_committed_study_covers_every_condition_and_of_the_paired_only_ten_samples_are_outside():
    record = json.loads(RESULT.read_text(encoding="utf-8"))
    assert record["replications"] >= 2000
    measured = {(row["kind"], row["stream"], row["samples"], row["ratio"]) for row in record["conditions"]}
    assert measured == {(c.kind, c.stream, c.samples, c.ratio) for c in conditions([PAIRED, OWN, UNPAIRED])}
    for row in record["conditions"]:
        if row["kind"] == PAIRED:
            assert (0.91 if row["samples"] == 10 else 0.93) <= row["coverage"] <= 0.97
    assert record["summary"][PAIRED]["result_says_faster_most"] <= 0.025
    assert max(record["interval_ms"].values()) < 50
