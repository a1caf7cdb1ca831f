"""Figures of predictions, on numbers that can be worked out by hand."""

import math

import numpy as np
import pytest
import torch

from elastickv.evaluation.metrics import Scores, fidelity, token_figures
from elastickv.evaluation.prediction_losses import prediction_losses


def scores(full, nll, kl=0.0, same=1.0):
    full, nll = np.asarray(full, float), np.asarray(nll, float)
    return Scores(full, nll, np.full(full.shape, kl), np.full(full.shape, same))


def test_figures_of_one_prediction():
    full, other = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]]) + 7
    full_nll, nll, kl, same = token_figures(full, other, [1])
    assert full_nll[0] == pytest.approx(math.log(4)) and nll[0] == pytest.approx(math.log(2))
    assert kl[0] == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5))
    assert same[0] == 0


def test_equal_predictions_differ_by_nothing():
    logits = np.random.default_rng(0).normal(size=(4, 50))
    full_nll, nll, kl, same = token_figures(logits, logits + 3, [1, 2, 3, 4])
    np.testing.assert_allclose(full_nll, nll)
    np.testing.assert_allclose(kl, 0, atol=1e-12)
    assert same.all()


def test_large_logits_do_not_overflow():
    figures = token_figures([[1e4, -1e4]], [[-1e4, 1e4]], [0])
    assert np.isfinite(figures).all() and figures[1][0] == pytest.approx(2e4)


def test_figures_of_many_predictions_are_those_of_each():
    full, other = 3 * torch.randn(2, 3, 40, 20, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(120).view(3, 40) % 20
    together = prediction_losses(full, other, targets)
    assert together.shape == (4, 3, 40)
    for row in range(3):
        each = token_figures(full[row].numpy(), other[row].numpy(), targets[row].numpy())
        np.testing.assert_allclose(together[:, row], each)


def test_the_perplexity_changes_by_the_mean_difference():
    estimates = fidelity(scores([[1.0, 2.0], [3.0, 4.0]], [[1.1, 2.1], [3.1, 4.1]], kl=0.25, same=0.5))
    assert estimates.ppl_change_percent.mean == pytest.approx(100 * (math.exp(0.1) - 1))
    # Every window changes alike: whichever are drawn, the mean is the same.
    assert estimates.ppl_change_percent.low == pytest.approx(estimates.ppl_change_percent.high)
    assert (estimates.kl.mean, estimates.top1_percent.mean) == (0.25, 50.0)
    assert estimates.full_ppl == pytest.approx(math.exp(2.5))


def test_the_interval_is_that_of_windows_not_of_tokens():
    """A thousand equal tokens in each of two windows are two observations."""
    nll = np.repeat([[0.0], [0.2]], 1000, axis=1)
    change_estimate = fidelity(scores(np.zeros_like(nll), nll)).ppl_change_percent
    assert change_estimate.low == pytest.approx(0) and change_estimate.high == pytest.approx(100 * math.expm1(0.2))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        change = rng.normal(0.05, 0.02, size=(16, 1))
        change_estimate = fidelity(scores(np.zeros_like(change), change)).ppl_change_percent
        covered += change_estimate.low <= 100 * math.expm1(0.05) <= change_estimate.high
    # The percentile bootstrap of 16 windows is somewhat narrow: 91 % or so.
    assert 80 <= covered <= 99
