"""Greedy decoding of a cache against full attention: the first token that differs, and the lengths of the texts."""

from dataclasses import asdict, dataclass
from typing import Any

from elastickv.evaluation.generations.token_choice import texts_of
from elastickv.evaluation.prefill import Tensor


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

    def as_dict(self) -> dict[str, Any]:
        """Return what a result says of it, as JSON values."""
        mean = sum(self.first_different) / len(self.first_different)
        return asdict(self) | {"first_different": list(self.first_different), "mean_first_different": mean}


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
    lengths = [sum(map(len, texts_of(rows, ends))) for rows in (generated, full)]
    return Divergence(tuple(positions), sum(p == tokens for p in positions), lengths[0] / lengths[1], tokens)


def end_tokens(model: object) -> set[int]:
    """Return the token ids that end a model's text."""
    value = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if value is None:
        return set()
    return set(value) if isinstance(value, (list, tuple)) else {int(value)}
