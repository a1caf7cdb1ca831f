"""Decode texts after a prefill: the one loop of greedy and sampled generation."""

from collections.abc import Callable, Collection, Sequence

import torch

from elastickv.evaluation.generations.token_choice import most_likely
from elastickv.evaluation.layer_progress import Progress
from elastickv.evaluation.prefill import Prefill, Tensor
from elastickv.evaluation.scoring import Open

_CHECKED_EVERY = 64  # steps: looking whether all texts have ended waits for the device


def continuations(
    first: Sequence[int],
    start: Prefill,
    decoding: Open,
    tokens: int,
    progress: Progress | None = None,
    choose: Callable[[Tensor], Tensor] = most_likely,
    ends: Collection[int] = (),
) -> Tensor:
    """Return (rows, n) generated token ids, n at most `tokens`: less where all texts have ended.

    Parameters
    ----------
    first : the token of each row that follows what `start` holds.
    choose : (rows, vocabulary) logits -> (rows,) tokens.
    ends : token ids that end a text.
    """
    ids, chosen = torch.tensor(list(first)), list[Tensor]()
    with decoding(start, tokens) as session:
        for step in range(tokens):
            # Tokens stay on the device: nothing waits for a step.
            ids = choose(session.step(ids))
            chosen.append(ids)
            if progress is not None:
                progress(step + 1, tokens)
            if ends and step % _CHECKED_EVERY == _CHECKED_EVERY - 1 and _all_ended(chosen, ends):
                break
        return torch.stack(chosen, 1).cpu()


def _all_ended(chosen: Sequence[Tensor], ends: Collection[int]) -> bool:
    rows = torch.stack(list(chosen), 1)
    return bool(torch.isin(rows, torch.tensor(sorted(ends), device=rows.device)).any(1).all())
