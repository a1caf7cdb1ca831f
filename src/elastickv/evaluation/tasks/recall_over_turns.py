"""Recall over several turns of a chat: what the first message says is asked for turn by turn, and answers are read back.

The turns after the first message are read through the cache token by token, as in a chat that goes on with the same cache (the
setting of SCBench, Li et al. 2024, arXiv 2412.10319). Answers of earlier turns are the right ones, so that all caches read the
same tokens; the answer to the last question is scored.
"""

import random

from elastickv.evaluation.tasks.shipped_material import Material
from elastickv.evaluation.tasks.synthetic_task import Draft, Size, SyntheticTask, Wording, shuffled_into

_TURNS = 4


class RecallOverTurns(SyntheticTask):
    """Four numbers in running text, and a question for one of them in each of four turns."""

    name = "multi_turn"
    source = "after SCBench, arXiv 2412.10319, with needles over the shipped texts"
    answer_tokens = 32
    wordings = (
        Wording(
            "Some special magic numbers are hidden within the following text. Make sure to memorize them. I will quiz you "
            "about the numbers afterwards, one by one.\n{context}\nWhat is the special magic number for {query} mentioned in "
            "the provided text?",
            " The special magic number for {query} mentioned in the provided text is",
            "What is the special magic number for {query} mentioned in the provided text?",
        ),
        Wording(
            "Read the text below. It contains special magic numbers, and I will ask for each of them in turn.\n{context}\n"
            "Which special magic number does the text above give for {query}?",
            " The text gives for {query} the special magic number",
            "And which special magic number does the text give for {query}?",
        ),
    )

    def draft(self, rng: random.Random, size: Size, material: Material) -> Draft:
        """Draw four numbers with their keys, hide them, and ask for them in random order."""
        keys = ["-".join(material.different_words(rng, 2)) for _ in range(_TURNS)]
        values = [str(rng.randint(10**6, 10**7 - 1)) for _ in keys]
        needles = [f"One of the special magic numbers for {key} is: {v}." for key, v in zip(keys, values, strict=True)]
        *earlier, (key, value) = rng.sample(list(zip(keys, values, strict=True)), _TURNS)
        context = " ".join(shuffled_into(rng, material.running_text(rng, size.units), needles))
        return Draft(context, {"query": key}, (value,), earlier=tuple(earlier))


RECALL_OVER_TURNS = RecallOverTurns()
