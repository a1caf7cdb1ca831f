"""How far a cache's predictions are from full attention's, with confidence intervals."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from elastickv.benchmark.stats.intervals import LEVEL
from elastickv.benchmark.stats.location import Float64

RESAMPLES = 10_000


@dataclass(frozen=True)
class Scores:
    """Figures of every scored token; each array is (windows, tokens).

    Attributes
    ----------
    full_nll, nll : negative log-likelihood of the token (natural logarithm) under full attention and under the measured cache.
    kl : KL(full || measured) of the predictions, nats.
    same_top : whether the most likely token is the same.
    """

    full_nll: Float64
    nll: Float64
    kl: Float64
    same_top: Float64


@dataclass(frozen=True)
class Estimate:
    """A mean and its bootstrap interval over windows or items."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Fidelity:
    """The loss of quality that a cache causes.

    Attributes
    ----------
    ppl_change_percent : change of the perplexity against full attention.
    kl : mean KL(full || measured), nats for each token.
    top1_percent : share of tokens whose most likely prediction is the same.
    full_ppl : perplexity under full attention.
    """

    ppl_change_percent: Estimate
    kl: Estimate
    top1_percent: Estimate
    full_ppl: float


def fidelity(scores: Scores, seed: int = 0) -> Fidelity:
    """Return the figures of scored windows with 95 % percentile bootstrap intervals (Efron 1979) over windows.

    The windows are resampled, not the tokens: tokens of a window depend on each other. With a single window the
    interval is its own figure.
    """
    change = (scores.nll - scores.full_nll).mean(axis=1)
    return Fidelity(
        estimate(change, seed, lambda mean: 100 * np.expm1(mean)),
        estimate(scores.kl.mean(axis=1), seed),
        estimate(scores.same_top.mean(axis=1), seed, lambda mean: 100 * mean),
        float(np.exp(scores.full_nll.mean())),
    )


def estimate(figures: Float64, seed: int = 0, shown: Callable[[Float64], Float64] = lambda mean: mean) -> Estimate:
    """Return the mean of independent figures with its 95 % percentile bootstrap interval (Efron 1979).

    Parameters
    ----------
    figures : (items,) one of each window or item.
    shown : applied to the mean and to the means of the resamples.
    """
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(figures), size=(RESAMPLES, len(figures)))
    means = shown(figures[picks].mean(axis=1))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(shown(figures.mean())), float(low), float(high))


def token_figures(full: ArrayLike, logits: ArrayLike, targets: ArrayLike) -> tuple[Float64, Float64, Float64, Float64]:
    """Return (full_nll, nll, kl, same_top), each (rows,), of one prediction for each row, in float64.

    Parameters
    ----------
    full, logits : (rows, vocabulary) logits of full attention and of the cache that is measured.
    targets : (rows,) the tokens that follow in the text.
    """
    p, q = (_log_softmax(np.asarray(x, np.float64)) for x in (full, logits))
    rows, ids = np.arange(len(p)), np.asarray(targets, np.int64)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    return -p[rows, ids], -q[rows, ids], kl, (p.argmax(axis=1) == q.argmax(axis=1)).astype(np.float64)


def _log_softmax(x: Float64) -> Float64:
    shifted = x - x.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
