"""Intervals cover the truth on synthetic streams; no clock is read here."""

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.benchmark.stats.intervals import (
    Interval,
    SummaryStats,
    beyond_noise,
    ratio_interval,
    ratio_of_summaries,
    student_quantile,
    truncated,
)
from elastickv.benchmark.stats.location import locate
from elastickv.errors import NonFiniteError


def ar1(rng, n, rho, sigma=0.02):
    noise = rng.standard_normal(n) * sigma * math.sqrt(1 - rho**2)
    x = np.empty(n)
    x[0] = rng.standard_normal() * sigma
    for i in range(1, n):
        x[i] = rho * x[i - 1] + noise[i]
    return x


STREAMS = {
    "independent": lambda rng, n: rng.standard_normal(n) * 0.02,
    "heavy tails": lambda rng, n: rng.standard_t(3, n) * 0.02,
    "bimodal clocks": lambda rng, n: rng.choice([-0.02, 0.02], n) + rng.standard_normal(n) * 0.002,
    "autocorrelated": lambda rng, n: ar1(rng, n, 0.6),
}


@pytest.mark.parametrize("name", STREAMS)
def test_the_interval_of_a_pair_covers_the_true_ratio(name):
    truth, trials, n = 1.9, 200, 200
    covered = 0
    for trial in range(trials):
        rng = np.random.default_rng([trial, 3])
        elastic = np.exp(rng.standard_normal(n) * 0.1)
        dense = elastic * truth * np.exp(STREAMS[name](rng, n))
        covered += ratio_interval(dense, elastic).contains(truth)
    # 95 % nominal; 200 trials put a true 93 % coverage above 0.88 with probability 0.995.
    assert covered / trials >= 0.88


def test_a_common_drift_cancels_in_pairs():
    drift = np.linspace(1, 3, 100)
    noise = np.random.default_rng(0).standard_normal(100) * 0.001
    paired = ratio_interval(2 * drift * np.exp(noise), drift)
    unpaired = ratio_interval(2 * drift * np.exp(noise), drift, paired=False)
    assert paired.half_width < 0.001
    assert unpaired.half_width > 0.05
    assert paired.contains(2)


def test_few_samples_give_a_wide_interval():
    few = ratio_interval([1.0, 1.1, 0.9], [1.0, 1.0, 1.0])
    many = ratio_interval([1.0, 1.1, 0.9] * 30, [1.0] * 90)
    assert few.half_width > 3 * many.half_width


def test_an_interval_is_one_of_95_percent_and_rests_on_the_side_with_fewer_samples():
    interval = ratio_interval([1.0, 1.1, 0.9, 1.0], [1.0, 1.2, 0.8], paired=False)
    assert (interval.level, interval.samples) == (0.95, 3)


@pytest.mark.parametrize("first", [0, 1])
def test_a_paired_interval_is_that_of_the_log_ratios_from_the_round_on_that_is_named(first):
    rng = np.random.default_rng(11)
    numerator, denominator = 3 + rng.random(41), 2 + rng.random(41)
    interval = ratio_interval(numerator, denominator, first=first)
    where = locate(np.log(numerator / denominator), first=first)
    margin = student_quantile(0.975, where.freedom) * math.sqrt(where.variance)
    expected = [math.exp(where.estimate + part) for part in (0, -margin, margin)]
    assert [interval.estimate, interval.low, interval.high] == pytest.approx(expected)
    assert interval.block_length == where.block_length > 1
    if first == 0:
        assert ratio_interval(numerator, denominator) == interval
    else:
        assert ratio_interval(numerator, denominator) != interval


def test_unpaired_the_estimate_is_the_ratio_of_the_midmeans_of_the_logs():
    numerator, denominator = np.exp([5.0, 1, 2, 3, 4, 6, 7, 70]), np.exp([1.0, 1, 1, 1, 2, 2, 2, 9])
    interval = ratio_interval(numerator, denominator, paired=False)
    assert math.log(interval.estimate) == pytest.approx((3 + 4 + 5 + 6) / 4 - (1 + 1 + 2 + 2) / 4)
    assert interval.block_length == 1


def test_faster_is_said_only_beyond_the_noise_floor():
    speedup, floor = Interval(1.1, 1.05, 1.15, 0.95, 50, 2), Interval(1.0, 0.96, 1.04, 0.95, 50, 2)
    assert beyond_noise(speedup, floor)
    assert not beyond_noise(speedup, replace(floor, high=1.05))
    assert not beyond_noise(replace(speedup, low=0.99), replace(floor, high=0.98))
    assert not beyond_noise(speedup, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_a_time_that_is_no_time_is_refused(bad):
    with pytest.raises(NonFiniteError, match="not a finite positive"):
        ratio_interval([1.0, bad], [1.0, 1.0])


def test_one_pair_makes_no_interval():
    with pytest.raises(ValueError, match="at least 2"):
        ratio_interval([1.0], [1.0])


@pytest.mark.parametrize("few", [3, 5])
def test_a_handful_of_runs_a_side_still_covers_the_truth(few):
    trials = 400
    covered = 0
    for trial in range(trials):
        rng = np.random.default_rng([trial, 13])
        numerator, denominator = (mean * np.exp(rng.standard_normal(few) * 0.03) for mean in (2.0, 1.0))
        covered += ratio_interval(numerator, denominator, math.inf, paired=False).contains(2.0)
    # 95 % nominal: 400 trials fall below 0.92 with probability 0.005.
    assert covered / trials >= 0.92


@pytest.mark.parametrize("percent", [0, 5, 10])
def test_moments_of_truncated_samples_give_the_interval_that_the_samples_would(percent):
    trials, n, covered = 300, 100, 0
    for trial in range(trials):
        rng = np.random.default_rng([trial, 11])
        sides = []
        for mean in (2.0, 1.0):
            kept = truncated(mean * (1 + 0.02 * rng.standard_normal(n)), percent)
            sides.append(SummaryStats(float(kept.mean()), float(kept.std()), n, percent))
        covered += ratio_of_summaries(*sides).contains(2.0)
    # Binomial: 95 % coverage is above 0.92 and below 0.98 of 300 trials with probability 0.98.
    assert 0.92 < covered / trials < 0.98


@pytest.mark.parametrize("bad", [(0.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (1.0, -1.0)])
def test_moments_that_are_none_are_refused(bad):
    with pytest.raises(NonFiniteError):
        ratio_of_summaries(SummaryStats(*bad, 10), SummaryStats(1.0, 0.1, 10))
    with pytest.raises(ValueError, match="at least 2"):
        ratio_of_summaries(SummaryStats(1.0, 0.1, 1), SummaryStats(1.0, 0.1, 10))


# Student's t at 97.5 %: NIST/SEMATECH e-Handbook, table 1.3.6.7.2.
@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.706), (2, 4.303), (5, 2.571), (10, 2.228), (30, 2.042), (math.inf, 1.960)]
)
def test_student_quantiles(freedom, value):
    assert student_quantile(0.975, freedom) == pytest.approx(value, rel=3e-3)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=50), st.floats(0, 45))
def test_truncation_cuts_both_ends_alike(samples, percent):
    kept = truncated(samples, percent)
    cut = int(len(samples) * percent / 100)
    np.testing.assert_array_equal(kept, sorted(samples)[cut : len(samples) - cut])
    assert len(kept) >= 1


def test_cuts_and_numbers_are_exact():
    kept = truncated(range(100, 0, -1), 1)
    np.testing.assert_array_equal(kept, np.arange(2.0, 100.0))
    assert kept.dtype == np.float64


def test_an_interval_contains_its_ends():
    interval = Interval(2.0, 1.5, 2.5, 0.95, 10, 1)
    assert [interval.contains(value) for value in (1.499, 1.5, 2.0, 2.5, 2.501)] == [False, True, True, True, False]
    assert interval.half_width == 0.25


@pytest.mark.parametrize(
    ("numerator", "denominator", "paired"), [([1, 1], [1, 1, 1], True), ([1], [1, 1], False), ([1, 1], [1], False)]
)
def test_too_few_samples_or_unequal_pairs_make_no_interval(numerator, denominator, paired):
    with pytest.raises(ValueError, match=f"{len(numerator)} and {len(denominator)} samples make no interval"):
        ratio_interval(numerator, denominator, paired=paired)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_a_denominator_that_is_no_time_is_refused(bad):
    with pytest.raises(NonFiniteError, match=r"^a time that is not a finite positive number: no figure is reported$"):
        ratio_interval([1.0, 1.0], [1.0, bad])
    with pytest.raises(NonFiniteError, match=r"^a time that is not a finite positive number: no figure is reported$"):
        ratio_of_summaries(SummaryStats(1.0, 0.1, 10), SummaryStats(bad, 0.1, 10))


def test_the_interval_of_moments_is_that_of_the_delta_method():
    numerator, denominator = SummaryStats(6.0, 0.3, 4), SummaryStats(3.0, 0.6, 9)
    interval = ratio_of_summaries(numerator, denominator)
    errors = 0.3 / 6 / 2, 0.6 / 3 / 3
    variances = [error**2 for error in errors]
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 3 + variances[1] ** 2 / 8)
    margin = student_quantile(0.975, freedom) * math.sqrt(sum(variances))
    expected = (2.0, 2 * math.exp(-margin), 2 * math.exp(margin), 0.95, 4, 1)
    got = (interval.estimate, interval.low, interval.high, interval.level, interval.samples, interval.block_length)
    assert got == pytest.approx(expected)
    point = ratio_of_summaries(SummaryStats(6.0, 0.0, 2), SummaryStats(3.0, 0.0, 5))
    assert (point.low, point.estimate, point.high) == (2.0, 2.0, 2.0)


# Abramowitz & Stegun 26.7.5: numerators by falling odd powers of z, and denominators.
EXPANSION = (((1, 1), 4), ((5, 16, 3), 96), ((3, 19, 17, -15), 384), ((79, 776, 1482, -1920, -945), 92160))


@pytest.mark.parametrize("freedom", [2.5, 3, 7.5])
@pytest.mark.parametrize("probability", [0.6, 0.975, 0.9995])
def test_the_quantile_is_the_published_expansion(probability, freedom):
    z = NormalDist().inv_cdf(probability)
    terms = [sum(c * z ** (2 * (len(numbers) - i) - 1) for i, c in enumerate(numbers)) / below for numbers, below in EXPANSION]
    expected = z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))
    assert student_quantile(probability, freedom) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.8, 0.975])
def test_quantiles_of_one_and_two_degrees_are_exact(probability):
    assert student_quantile(probability, 1) == pytest.approx(-1 / math.tan(math.pi * probability), abs=1e-12)
    t = student_quantile(probability, 2)
    assert 0.5 + t / (2 * math.sqrt(2 + t**2)) == pytest.approx(probability)
