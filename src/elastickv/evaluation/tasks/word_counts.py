"""Which words are frequent: RULER's `cwe` and `fwe` (Hsieh et al. 2024, common_words_extraction.py, freq_words_extraction.py).

Different from RULER's: the words of `cwe` are those of the shipped texts, and every item has its own order and vocabulary.
"""

import math
import random
import string

from elastickv.evaluation.tasks.shipped_material import Material
from elastickv.evaluation.tasks.synthetic_task import RULER, Draft, Size, SyntheticTask, Wording

_COMMON_WORDS = 10
_LONG = 4096  # tokens from which on words are repeated more often
_CODED_LETTERS = 6
_TOKENS_PER_CODED_WORD = 50  # of the vocabulary
_FREQUENT = 3
_ZETA_2 = math.pi**2 / 6


class CommonWords(SyntheticTask):
    """A numbered list of words, ten of which appear ten times as often as the others."""

    name = "cwe"
    source = f"{RULER}, words of the shipped texts"
    answer_tokens = 120
    wordings = (
        Wording(
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
            "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
            " Answer: The top 10 words that appear most often in the list are:",
        ),
        Wording(
            "The numbered list below repeats some words more often than others. Keep in mind which ones are repeated most.\n"
            "{context}\nQuestion: Which 10 words does the list above repeat most often?",
            " Answer: The 10 words that the list repeats most often are:",
        ),
    )

    def draft(self, rng: random.Random, size: Size, material: Material) -> Draft:
        """Draw an example and a list with `units` uncommon words."""
        if size.tokens < _LONG:
            example = _numbered(material.different_words(rng, 20), 3, 1, rng, None)
            common, uncommon = 6, 1
        else:
            example = _numbered(material.different_words(rng, 40), 10, 3, rng, None)
            common, uncommon = 30, 3
        words = material.different_words(rng, min(_COMMON_WORDS + size.units, len(material.words)))
        return _numbered(words, common, uncommon, rng, example)


def _numbered(words: list[str], common: int, uncommon: int, rng: random.Random, example: Draft | None) -> Draft:
    answers = words[:_COMMON_WORDS]
    repeated = answers * common + words[_COMMON_WORDS:] * uncommon
    rng.shuffle(repeated)
    context = " ".join(f"{number}. {word}" for number, word in enumerate(repeated, 1))
    listed = " ".join(f"{number}. {word}" for number, word in enumerate(answers, 1))
    return Draft(context, {"listed": listed}, tuple(answers), example)


class FrequentWords(SyntheticTask):
    """A text of coded words whose counts fall with the square of their rank; the most frequent one is dots."""

    name = "fwe"
    source = RULER
    answer_tokens = 50
    least_units = 120
    wordings = (
        Wording(
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
            "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
            "three most frequently appeared words in the above coded text?",
            " Answer: According to the coded text above, the three most frequently appeared words are:",
        ),
        Wording(
            "The text below is in code. Count how often each coded word appears in it. {context}\nQuestion: Apart from the "
            "dots '....', which three coded words appear most often in the text above? Name them without any explanation.",
            " Answer: The three coded words that appear most often in the text are:",
        ),
    )

    def draft(self, rng: random.Random, size: Size, material: Material) -> Draft:
        """Draw a vocabulary; the word of rank k appears units / (k^2 zeta(2)) times, rounded down."""
        count = max(_FREQUENT + 1, size.tokens // _TOKENS_PER_CODED_WORD)
        coded: dict[str, None] = {}
        while len(coded) < count:
            coded["".join(rng.choices(string.ascii_lowercase, k=_CODED_LETTERS))] = None
        words = ["...", *list(coded)[1:]]
        text = [word for rank, word in enumerate(words, 1) for _ in range(int(size.units / (rank * rank * _ZETA_2)))]
        rng.shuffle(text)
        return Draft(" ".join(text), {}, tuple(words[1 : _FREQUENT + 1]))


COMMON_WORDS, FREQUENT_WORDS = CommonWords(), FrequentWords()
