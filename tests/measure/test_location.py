"""Huber's location and its blocks: what is robust, what is independent, and what dependence costs."""

import math

import numpy as np
import pytest

from elastickv.measure.location import LEAST_BLOCKS, MIRRORED, block_length, huber, locate

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
