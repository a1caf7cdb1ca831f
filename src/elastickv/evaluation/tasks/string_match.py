"""How answers are scored: RULER's string matches, and exact match and F1 as SQuAD and LongBench count them.

RULER: `scripts/eval/synthetic/constants.py` and `evaluate.py` (Hsieh et al. 2024). SQuAD: `evaluate-v1.1.py` (Rajpurkar et al.
2016); LongBench's `qa_f1_score` is the same F1 (Bai et al. 2023).
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

_NOT_PRINTABLE = re.compile(r"[\x00-\x1f]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")

Metric = Callable[[str, Sequence[str]], float]


def string_match_all(text: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that are in a text, in any case of letters."""
    lowered = _readable(text)
    return sum(answer.lower() in lowered for answer in answers) / len(answers)


def string_match_part(text: str, answers: Sequence[str]) -> float:
    """Return whether one of the answers is in a text, in any case of letters."""
    lowered = _readable(text)
    return float(any(answer.lower() in lowered for answer in answers))


def exact_match(text: str, answers: Sequence[str]) -> float:
    """Return whether a text's first line is one of the answers, apart from case, punctuation, articles and spaces."""
    line = _normalized(first_line(text))
    return float(any(line == _normalized(answer) for answer in answers))


def word_f1(text: str, answers: Sequence[str]) -> float:
    """Return the largest harmonic mean of precision and recall of a text's first line, in words, over the answers."""
    return max(_f1(_normalized(first_line(text)).split(), _normalized(answer).split()) for answer in answers)


def first_line(text: str) -> str:
    """Return the first line of a text that is not empty."""
    return next((line for line in text.splitlines() if line.strip()), "")


def _readable(text: str) -> str:
    return _NOT_PRINTABLE.sub("\n", text.strip()).strip().lower()


def _normalized(text: str) -> str:
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def _f1(words: Sequence[str], answer: Sequence[str]) -> float:
    common = sum((Counter(words) & Counter(answer)).values())
    if not common:
        return float(not words and not answer)
    precision, recall = common / len(words), common / len(answer)
    return 2 * precision * recall / (precision + recall)


METRICS: Mapping[str, Metric] = {
    "all": string_match_all,
    "part": string_match_part,
    "exact": exact_match,
    "f1": word_f1,
}
# A longer text never lowers these.
GROWING = frozenset({"all", "part"})
