"""BLEU of token ids."""

from collections import Counter
from collections.abc import Sequence
from math import exp, log

LONGEST = 4  # tokens of an n-gram
SMOOTHING = 0.1  # matches that an n-gram order without any counts as


def bleu(hypothesis: Sequence[int], references: Sequence[Sequence[int]], longest: int = LONGEST) -> float:
    """Return the BLEU of a text against several references, from 0 to 1 (Papineni et al. 2002).

    The geometric mean of the shares of its n-grams, n = 1 to `longest`, that references hold, each n-gram counted at most as
    often as in the reference that holds most of it; times exp(1 - r/c) where the text's c tokens are fewer than the r of the
    reference of the closest length, the shorter of two. Where no n-gram of a length occurs, the numerator is 0.1 (Chen and
    Cherry 2014, smoothing 1), as for the self-BLEU of Zhu et al. (2018, arXiv 1802.01886).
    """
    if not hypothesis:
        return 0.0
    logarithms = []
    for length in range(1, longest + 1):
        counts, most = _grams(hypothesis, length), Counter[tuple[int, ...]]()
        for reference in references:
            most |= _grams(reference, length)
        matches = (counts & most).total()
        if length == 1 and not matches:
            return 0.0
        logarithms.append(log((matches or SMOOTHING) / max(1, counts.total())))
    own = len(hypothesis)
    closest = min((len(reference) for reference in references), key=lambda other: (abs(other - own), other))
    return exp(sum(logarithms) / longest + min(0.0, 1 - closest / own))


def _grams(ids: Sequence[int], length: int) -> Counter[tuple[int, ...]]:
    return Counter(zip(*(ids[start:] for start in range(length)), strict=False))
