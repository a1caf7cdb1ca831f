"""What another KV cache does to a model's predictions of a text: the price that stands beside its speed."""

from dataclasses import dataclass

import numpy as np

from elastickv.evaluation.metrics import Scores


@dataclass(frozen=True)
class QualityDelta:
    """Predictions with a cache against those with the reference cache, token by token of a text.

    Attributes
    ----------
    reference : the cache that it is held against.
    text : the text's name.
    context, tokens : tokens before the first prediction, and predictions.
    perplexity, reference_perplexity : with this cache and with the reference.
    kl_mean, kl_p95, kl_max : KL(reference || this) of a prediction over the whole vocabulary, nats.
    top1_percent : predictions whose likeliest token is the same.
    """

    reference: str
    text: str
    context: int
    tokens: int
    perplexity: float
    reference_perplexity: float
    kl_mean: float
    kl_p95: float
    kl_max: float
    top1_percent: float


def quality_delta(reference: str, text: str, context: int, scores: Scores) -> QualityDelta:
    """Summarize scored predictions; full attention in `scores` is the reference cache."""
    kl = scores.kl.ravel()
    return QualityDelta(
        reference=reference,
        text=text,
        context=context,
        tokens=kl.size,
        perplexity=float(np.exp(scores.nll.mean())),
        reference_perplexity=float(np.exp(scores.full_nll.mean())),
        # Rounding may put a KL of 0 slightly below 0.
        kl_mean=max(0.0, float(kl.mean())),
        kl_p95=max(0.0, float(np.quantile(kl, 0.95))),
        kl_max=max(0.0, float(kl.max())),
        top1_percent=100 * float(scores.same_top.mean()),
    )
