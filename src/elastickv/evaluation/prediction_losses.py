"""`metrics.token_figures` of many predictions, computed where the logits are."""

from collections.abc import Sequence

import torch

from elastickv.benchmark.stats.location import Float64
from elastickv.evaluation.prefill import Tensor

_PREDICTIONS_AT_ONCE = 64


def prediction_losses(full: Tensor, logits: Tensor, targets: Sequence[int] | Tensor) -> Float64:
    """Return (4, ...) figures of predictions, float64: full_nll, nll, kl, same_top, as `Scores` has them.

    Parameters
    ----------
    full, logits : (..., vocabulary) logits of full attention and of the cache that is measured; they are compared on the
        device of `logits`.
    targets : (...) the tokens that follow in the text.
    """
    expected = torch.as_tensor(targets, device=logits.device)
    parts = zip(*(x.flatten(0, -2).split(_PREDICTIONS_AT_ONCE) for x in (full, logits)), strict=True)
    followed = expected.flatten().split(_PREDICTIONS_AT_ONCE)
    figures = [_figures(p.to(q), q, ids) for (p, q), ids in zip(parts, followed, strict=True)]
    whole: Float64 = torch.cat(figures, 1).unflatten(1, expected.shape).cpu().numpy()
    return whole


def _figures(full: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    p, q = (torch.log_softmax(x.double(), -1) for x in (full, logits))
    nll = [-x.gather(1, targets[:, None])[:, 0] for x in (p, q)]
    kl = (p.exp() * (p - q)).sum(1)
    return torch.stack([*nll, kl, (p.argmax(1) == q.argmax(1)).double()])
