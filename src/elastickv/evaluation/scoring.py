"""Teacher-forced scoring: feed a text to a cache and compare every prediction with full attention's."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from elastickv.evaluation.layer_progress import Progress
from elastickv.evaluation.metrics import Scores
from elastickv.evaluation.prediction_losses import prediction_losses
from elastickv.evaluation.prefill import Prefill
from elastickv.evaluation.sessions import DecodingSession
from elastickv.evaluation.texts import Window

TOKENS_AT_ONCE = 64
Open = Callable[[Prefill, int], AbstractContextManager[DecodingSession]]
"""(prefill, tokens that will be decoded) -> a session that decodes after it."""


def score(rows: Sequence[Window], start: Prefill, decoding: Open, progress: Progress | None = None) -> Scores:
    """Score the last tokens of every window through a decode path.

    A cache that decodes is fed one token a row at each step. References, which know what each step would read, are fed up to
    64 tokens a row at once.

    Parameters
    ----------
    rows : windows of n + s + 1 tokens, of which the last s are scored.
    start : prefill of these windows: keys and values of the first n tokens, logits of the s positions after them.
    decoding : opens the decode path.
    """
    first, steps = start.tokens, start.logits.shape[1]
    ids = torch.tensor([row.ids for row in rows])
    figures = np.empty((4, len(rows), steps))
    with decoding(start, steps) as session:
        at_once = TOKENS_AT_ONCE if session.takes_several else 1
        for begin in range(0, steps, at_once):
            end = min(begin + at_once, steps)
            logits = session.read(ids[:, first + begin : first + end])
            targets = ids[:, first + begin + 1 : first + end + 1]
            figures[:, :, begin:end] = prediction_losses(start.logits[:, begin:end], logits, targets)
            if progress is not None:
                progress(end, steps)
    return Scores(*figures)
