"""The quality cost of a KV cache: what it does to a model's predictions of a text."""

import numpy as np

from elastickv.evaluation.metrics import Scores
from elastickv.results.kinds.model_result import QualityDelta


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
