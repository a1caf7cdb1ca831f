"""Teacher-forced scoring: feed a text token by token and compare every prediction with full attention's."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from elastickv.evaluation.layer_progress import Progress
from elastickv.evaluation.metrics import Scores, token_figures
from elastickv.evaluation.prefill import Prefill
from elastickv.evaluation.sessions import DecodingSession
from elastickv.evaluation.texts import Window

Open = Callable[[Prefill, int], AbstractContextManager[DecodingSession]]
"""(prefill, tokens that will be decoded) -> a session that decodes after it."""


def score(rows: Sequence[Window], start: Prefill, decoding: Open, progress: Progress | None = None) -> Scores:
    """Score the last tokens of every window through a decode path.

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
        for step in range(steps):
            logits = session.step(ids[:, first + step])
            figures[:, :, step] = token_figures(start.logits[:, step], logits.cpu(), ids[:, first + step + 1])
            if progress is not None:
                progress(step + 1, steps)
    return Scores(*figures)
