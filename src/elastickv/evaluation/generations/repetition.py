"""How much of a text repeats itself."""

from collections.abc import Sequence

LENGTH = 4  # tokens of an n-gram
LOOP = 0.5


def repetition_rate(ids: Sequence[int], length: int = LENGTH) -> float:
    """Return the share of a text's n-grams that occurred earlier in it: seq-rep-n of Welleck et al. (2019, arXiv 1908.04319).

    1 - different n-grams / n-grams; 0 where the text is shorter than an n-gram.
    """
    grams = list(zip(*(ids[start:] for start in range(length)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Return whether more than half of the 4-grams of a text's last quarter occurred earlier in that quarter.

    The rate of the whole text does not tell a text that repeats itself at its end from one that always does so a little.
    """
    return repetition_rate(ids[len(ids) - len(ids) // 4 :]) > LOOP
