"""Huber's location and its blocks: what is robust, what is independent, and what dependence costs."""

import math

import numpy as np
import pytest

from elastickv.benchmark.stats import location
from elastickv.benchmark.stats.location import LEAST_BLOCKS, MIRRORED, block_length, huber, locate, midmean

RNG = np.random.default_rng


def ar1(rng, n, rho):
    x = rng.standard_normal(n)
    for i in range(1, n):
        x[i] = rho * x[i - 1] + math.sqrt(1 - rho**2) * x[i]
    return x


def test_the_location_solves_hubers_equation():
    values = RNG(0).standard_t(2, 200)
    estimate, influence = huber(values)
    lower, upper = np.quantile(values, (0.25, 0.75))
    bound = 1.345 * (upper - lower) / 1.349
    assert np.clip(values - estimate, -bound, bound).sum() == pytest.approx(0, abs=1e-3 * bound)
    assert influence.mean() == pytest.approx(0, abs=1e-6)


def test_without_a_bend_it_is_the_mean():
    values = RNG(1).standard_normal(50)
    assert huber(values, math.inf)[0] == pytest.approx(values.mean())
    assert locate(values[:9], math.inf).variance == pytest.approx(values[:9].var(ddof=1) / 9)


def test_a_fifth_of_wild_values_moves_it_by_a_part_of_the_noise():
    values = RNG(2).standard_normal(100)
    wild = values.copy()
    wild[::5] = 1e6
    assert abs(huber(wild)[0] - huber(values)[0]) < 0.6
    assert locate(wild).variance < 10 * locate(values).variance


def test_two_clocks_are_not_taken_for_one_with_outliers():
    values = np.where(np.arange(100) % 20 < 9, 1.0, 0.0) + 0.001 * RNG(3).standard_normal(100)
    assert huber(values)[0] == pytest.approx(0.45, abs=0.05)


def test_where_half_of_the_values_are_the_same_it_is_the_mean_and_not_certain():
    values = np.array([1.0] * 8 + [1.2, 1.4])
    assert locate(values).estimate == pytest.approx(1.06)
    assert locate(values).variance > 0


@pytest.mark.parametrize("first", [0, 1])
def test_a_drift_cancels_over_mirrored_rounds_wherever_the_series_begins(first):
    # Cut between them instead, blocks would hold the last of one pair and the first of the next, whose signs are free.
    drifting = (RNG(4).choice([-1.0, 1.0], 30).repeat(2) * np.tile([1.0, -1.0], 30))[first:]
    aligned, across = (locate(drifting, math.inf, start).variance for start in (first, 1 - first))
    assert aligned < 0.2 * across


def test_the_error_of_a_dependent_series_is_that_of_its_mean():
    for rho in (0.0, 0.5, 0.8):
        found = [locate(ar1(RNG([seed, 5]), 200, rho), math.inf) for seed in range(300)]
        actual = np.var([where.estimate for where in found])
        assert 0.75 < np.mean([where.variance for where in found]) / actual < 1.5, rho


def test_dependence_costs_degrees_of_freedom():
    free, bound = (locate(ar1(RNG(6), 100, rho)).freedom for rho in (0.0, 0.8))
    assert bound < 0.5 * free


def test_blocks_grow_with_dependence_only():
    lengths = [np.mean([block_length(ar1(RNG([seed, 7]), 400, rho)) for seed in range(20)]) for rho in (0, 0.3, 0.6, 0.9)]
    assert lengths[0] < 1.5
    assert lengths == sorted(lengths)
    assert lengths[3] > 10


def test_blocks_are_mirrored_rounds_and_there_are_enough():
    seen = {locate(ar1(RNG([seed, 8]), 100, 0.9) + RNG([seed, 9]).standard_normal(100)).block_length for seed in range(40)}
    assert len(seen) > 1
    assert all(length % MIRRORED == 0 and 100 // length >= LEAST_BLOCKS for length in seen)
    assert locate([1.0, 2.0, 3.0]).block_length == 1


def test_times_by_themselves_are_located_by_their_midmean():
    times = RNG(9).lognormal(0, 1, 200)
    found = locate(times, symmetric=False)
    assert found.estimate == pytest.approx(np.sort(times)[50:150].mean())
    drawn = [locate(RNG([seed, 10]).lognormal(0, 1, 100), symmetric=False) for seed in range(300)]
    assert 0.8 < np.mean([where.variance for where in drawn]) / np.var([where.estimate for where in drawn]) < 1.35


def test_a_midmean_counts_what_it_leaves_out_as_the_nearest_that_it_keeps():
    estimate, influence = midmean(np.array([7.0, 0.0, 100.0, 3.0, 4.0, 5.0, 1.0, 6.0]))
    assert estimate == (3 + 4 + 5 + 6) / 4
    # Of the eight the two least count as 3 and the two largest as 6; half of them are kept.
    counted = np.array([6.0, 3, 6, 3, 4, 5, 3, 6])
    np.testing.assert_allclose(influence, 2 * (counted - 36 / 8))


def test_the_first_autocorrelation_is_corrected_by_one_and_four_of_itself_over_n():
    assert location._first_autocorrelation(np.array([1.0, 1.0, -1.0, -1.0])) == pytest.approx(1 / 4 + (1 + 4 / 4) / 4)
    assert location._first_autocorrelation(np.array([0.6, 0.8])) == pytest.approx(0.48 + (1 + 4 * 0.48) / 2)
    assert location._first_autocorrelation(np.zeros(10)) == 0


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.95])
def test_prewhitening_leaves_the_innovations_with_the_variance_of_the_series_mean(rho):
    n = 12
    of_mean = sum(rho ** abs(i - j) for i in range(n) for j in range(n)) / n
    # What follows from its first value alone has no innovation but that: 1 / sqrt(1 - rho^2) of it in a stationary series.
    expected = np.zeros(n)
    expected[0] = math.sqrt(of_mean)
    np.testing.assert_allclose(location._prewhitened(rho ** np.arange(n), rho), expected, atol=1e-12)
    step = np.zeros(n)
    step[5] = 1
    assert location._prewhitened(step, rho)[5] == pytest.approx(math.sqrt(of_mean / (1 - rho**2)))


def test_blocks_are_shortened_by_no_value():
    np.testing.assert_allclose(location._block_means(np.arange(7.0), 2, 0), [0.5, 2.5, (4 + 5 + 6) / 3])
    np.testing.assert_allclose(location._block_means(np.arange(7.0), 2, 1), [(0 + 1 + 2) / 3, 3.5, 5.5])


def test_degrees_of_freedom_are_the_blocks_less_one_and_less_what_the_dependence_cost():
    series = ar1(RNG(12), 120, 0.7)
    found = locate(series, math.inf)
    rho = location._first_autocorrelation(series - series.mean())
    assert 0.5 < rho < 0.9
    assert 1 / found.freedom == pytest.approx(1 / (120 // found.block_length - 1) + 2 * (1 + rho) / ((1 - rho) * 120))


def test_from_ten_values_on_blocks_are_mirrored_and_eight_of_them_are_left():
    assert [locate(ar1(RNG(14), n, 0.5)).block_length for n in (9, 10)] == [1, MIRRORED]
    assert {locate(ar1(RNG([seed, 15]), 24, 0.9)).block_length for seed in range(40)} == {MIRRORED}


def test_too_few_values_for_blocks_count_each_wherever_the_series_begins():
    values = RNG(16).standard_normal(9)
    for first in (0, 1):
        assert locate(values, math.inf, first).variance == pytest.approx(values.var(ddof=1) / 9)


def published_block_length(series):
    """The rule of Politis & White for the circular bootstrap, as they write it."""
    n, centred = len(series), np.asarray(series) - np.mean(series)

    def covariance(lag):
        return sum(centred[i] * centred[i + lag] for i in range(n - lag)) / n

    patience = max(5, math.ceil(math.sqrt(math.log10(n))))
    most = min(math.ceil(math.sqrt(n)) + patience, n - 1)
    bound = 2 * math.sqrt(math.log10(n) / n)
    seen = [lag for lag in range(1, most + 1) if abs(covariance(lag) / covariance(0)) >= bound]
    last = 0  # the last of those that as many lags without correlation follow
    for lag in seen:
        if lag - last <= patience:
            last = lag
        else:
            break
    if not last:
        return 1
    lags = range(1, min(2 * last, most) + 1)
    flat_top = {lag: min(1, max(0, 2 * (1 - lag / (2 * last)))) for lag in lags}
    spectrum = covariance(0) + 2 * sum(flat_top[lag] * covariance(lag) for lag in lags)
    if spectrum <= 0:
        return 1
    curvature = 2 * sum(flat_top[lag] * lag * covariance(lag) for lag in lags)
    return max(1, math.ceil((2 * curvature**2 / (4 / 3 * spectrum**2) * n) ** (1 / 3)))


@pytest.mark.parametrize("rho", [-0.6, 0.0, 0.4, 0.8, 0.95])
@pytest.mark.parametrize("n", [8, 40, 200])
def test_blocks_are_as_long_as_the_published_rule_has_them(rho, n):
    for seed in range(5):
        series = 3 + ar1(RNG([seed, 13]), n, rho)
        assert block_length(series) == published_block_length(series)


@pytest.mark.parametrize("n", range(22, 31))
def test_waves_whose_correlation_comes_and_goes_have_blocks_as_published(n):
    """Lags that follow after a gap, of just as many as are waited for, are where the rule is told from its neighbours."""
    for seed in range(40):
        rng = RNG([seed, n, 16])
        series = np.sin(np.arange(n) * rng.uniform(0.2, 3)) + 0.3 * rng.standard_normal(n)
        assert block_length(series) == published_block_length(series)


def test_what_does_not_vary_or_is_too_short_has_blocks_of_one():
    assert block_length(np.ones(50)) == 1
    assert block_length(np.linspace(0, 1, LEAST_BLOCKS - 1)) == 1
