"""Retrieval of a pass key that is hidden in a text at some depth (after Mohtashami and Jaggi 2023).

The words are those of RULER's single needle (Hsieh et al. 2024), through the tokenizer's chat template where it has one: the
model is told beforehand what to look for, and the answer's beginning asks for a number. After a bare "The pass key is" small
models go on with a description, as in "a musical instrument" in a text on music, with full attention too.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elastickv.errors import UsageError
from elastickv.evaluation.generations.continuations import continuations
from elastickv.evaluation.layer_progress import Progress
from elastickv.evaluation.prefill import Prefill
from elastickv.evaluation.scoring import Open
from elastickv.evaluation.tasks.task_prompts import prompt_text
from elastickv.transformers.tokenization import text_prefix, text_tokens

DIGITS = 5
ANSWER_TOKENS = 10
NEEDLE = " One of the special magic numbers for pass-key is: {key}. "
OPENING = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number "
    "afterwards.\n"
)
QUESTION = "\nWhat is the special magic number for pass-key mentioned in the provided text?"
ANSWER_PREFIX = " The special magic number for pass-key mentioned in the provided text is"
_HAYSTACK = "<<elastickv:haystack>>"


@dataclass(frozen=True)
class Case:
    """A prompt and the answer to it.

    Attributes
    ----------
    length : tokens of the prompt.
    depth : the position of the key, from 0, the beginning, to 1.
    ids : the prompt.
    key : digits.
    """

    length: int
    depth: float
    ids: tuple[int, ...]
    key: str


def cases(tokenizer: Any, haystack: str, length: int, depths: Sequence[float], seed: int = 0) -> list[Case]:
    """Return one case for each depth, all of exactly `length` tokens, those that the tokenizer puts before a text included.

    Raises
    ------
    UsageError : if the haystack is too short, or the length leaves no room for key and question.
    """
    rng = random.Random(seed * 1_000_003 + length)
    text = prompt_text(tokenizer, [OPENING + _HAYSTACK + QUESTION], ANSWER_PREFIX)
    opening, question = (text_tokens(tokenizer, part) for part in text.split(_HAYSTACK))
    prefix, hay = (*text_prefix(tokenizer), *opening), text_tokens(tokenizer, haystack)
    prompts = []
    for depth in depths:
        key = "".join(rng.choice("123456789") for _ in range(DIGITS))
        needle = text_tokens(tokenizer, NEEDLE.format(key=key))
        room = length - len(prefix) - len(needle) - len(question)
        if room < 1:
            raise UsageError(f"a needle at {length} tokens: at least {length - room + 1} are needed")
        if room > len(hay):
            raise UsageError(
                f"a needle at {length} tokens needs a text of {room}, and there are {len(hay)}: give a longer text"
            )
        before = round(depth * room)
        prompts.append(Case(length, depth, (*prefix, *hay[:before], *needle, *hay[before:room], *question), key))
    return prompts


def answered(
    rows: Sequence[Case], start: Prefill, decoding: Open, tokenizer: Any, progress: Progress = lambda done, total: None
) -> list[bool]:
    """Return for every case whether the generated text begins with the key.

    Parameters
    ----------
    start : of the prompts without their last token.
    """
    answers = continuations([row.ids[-1] for row in rows], start, decoding, ANSWER_TOKENS, progress)
    return [begins_with_key(ids.tolist(), row, tokenizer) for ids, row in zip(answers, rows, strict=True)]


def begins_with_key(answer: Sequence[int], case: Case, tokenizer: Any) -> bool:
    """Return whether the first number of the text of generated tokens is the key of a case, and nothing but marks before it."""
    text: str = tokenizer.decode(list(answer), skip_special_tokens=True)
    first = re.match(r"[\s:*\"'`“(]*(\d+)", text)
    return first is not None and first[1] == case.key
