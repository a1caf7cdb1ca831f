"""Greedy decoding of a cache against full attention: the first token that differs, and the lengths of the texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from elastickv.evaluation.layer_progress import Progress
from elastickv.evaluation.prefill import Prefill, Tensor
from elastickv.evaluation.scoring import Open


@dataclass(frozen=True)
class Divergence:
    """Greedy decoding against full attention's.

    Attributes
    ----------
    first_different : for every row, the number of the first token that differs; if none does, the number of tokens.
    same_rows : rows without a difference.
    length_ratio : tokens up to the end of the text / those of full attention, summed over rows.
    tokens : tokens generated.
    """

    first_different: tuple[int, ...]
    same_rows: int
    length_ratio: float
    tokens: int


def greedy(
    first: Sequence[int], start: Prefill, decoding: Open, tokens: int, progress: Progress = lambda done, total: None
) -> Tensor:
    """Return the (rows, tokens) most likely continuations.

    Parameters
    ----------
    first : the token of each row that follows what `start` holds.
    """
    generated = torch.empty(len(first), tokens, dtype=torch.long)
    ids = torch.tensor(list(first))
    with decoding(start, tokens) as session:
        for step in range(tokens):
            ids = session.step(ids).argmax(-1).cpu()
            generated[:, step] = ids
            progress(step + 1, tokens)
    return generated


def divergence(full: Tensor, generated: Tensor, ends: set[int]) -> Divergence:
    """Compare continuations.

    Parameters
    ----------
    full, generated : (rows, tokens) of full attention and of the cache that is compared.
    ends : token ids that end a text.
    """
    tokens = full.shape[1]
    positions = [
        next((i for i in range(tokens) if int(a[i]) != int(b[i])), tokens) for a, b in zip(full, generated, strict=True)
    ]
    lengths = [sum(_length(row.tolist(), ends) for row in rows) for rows in (generated, full)]
    return Divergence(tuple(positions), sum(p == tokens for p in positions), lengths[0] / lengths[1], tokens)


def _length(ids: list[int], ends: set[int]) -> int:
    return next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))


def end_tokens(model: object) -> set[int]:
    """Return the token ids that end a model's text."""
    value = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if value is None:
        return set()
    return set(value) if isinstance(value, (list, tuple)) else {int(value)}
