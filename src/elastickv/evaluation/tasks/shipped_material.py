"""What synthetic prompts are made of: sentences, paragraphs and words of the shipped texts that are scored."""

import random
import re
from dataclasses import dataclass
from functools import cache

from elastickv.evaluation.texts import evaluation_texts

# RULER's, `niah.py` and `variable_tracking.py`.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_SENTENCE = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(]*[A-Z])")
_WORD = re.compile(r"[a-z]+")
_WORD_LETTERS = range(4, 11)
_PARAGRAPH_CHARACTERS = range(200, 1601)


@dataclass(frozen=True)
class Material:
    """Pieces of the texts, in the order of the texts.

    Attributes
    ----------
    sentences : all of them.
    paragraphs : those of 200 to 1600 characters.
    words : the different lower-case words of 4 to 10 letters.
    """

    sentences: tuple[str, ...]
    paragraphs: tuple[str, ...]
    words: tuple[str, ...]

    def running_text(self, rng: random.Random, count: int) -> list[str]:
        """Return consecutive sentences from a random one on; after the last one comes the first."""
        first = rng.randrange(len(self.sentences))
        return [self.sentences[(first + i) % len(self.sentences)] for i in range(count)]

    def different_words(self, rng: random.Random, count: int) -> list[str]:
        """Return words, no two alike."""
        return rng.sample(self.words, count)


@cache
def shipped_material() -> Material:
    """Return the material of the texts that the package ships to be scored; nothing of it is in the calibration text."""
    paragraphs = [
        " ".join(block.split()) for text in evaluation_texts() for block in re.split(r"\n\s*\n", text.content) if block.strip()
    ]
    sentences = [sentence for paragraph in paragraphs for sentence in sentences_of(paragraph)]
    words = {word for word in re.split(r"[^A-Za-z]+", " ".join(paragraphs)) if _WORD.fullmatch(word)}
    return Material(
        tuple(sentences),
        tuple(paragraph for paragraph in paragraphs if len(paragraph) in _PARAGRAPH_CHARACTERS),
        tuple(sorted(word for word in words if len(word) in _WORD_LETTERS)),
    )


def sentences_of(paragraph: str) -> list[str]:
    """Return the sentences of a paragraph: pieces between a full stop, question or exclamation mark and a capital letter."""
    return [sentence for sentence in _SENTENCE.split(paragraph) if sentence.strip()]
