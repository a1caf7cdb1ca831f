"""Items as tokens: through the tokenizer's chat template where it has one, and of exactly the length that was requested."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elastickv.errors import UsageError
from elastickv.evaluation.tasks.shipped_material import NOISE, Material
from elastickv.evaluation.tasks.synthetic_task import Draft, Size, SyntheticTask, Wording
from elastickv.transformers.tokenization import text_prefix, text_tokens

# Places in a prompt's text, in words that no text has: templates may strip spaces, and are searched for these.
_CONTEXT, _LATER = "<<elastickv:context>>", "<<elastickv:later>>"
_TRIES = 8
_MARGIN = 3


@dataclass(frozen=True)
class TaskItem:
    """A prompt and what its answer is matched with.

    Attributes
    ----------
    ids : tokens of the prompt.
    answers : the strings that the metric looks for.
    stepped : number of last tokens of the prompt that are read through the cache token by token, at least 1.
    metric : how the answer is scored.
    """

    ids: tuple[int, ...]
    answers: tuple[str, ...]
    stepped: int
    metric: str


@dataclass(frozen=True)
class _Pieces:
    """A prompt's tokens before filler, from the context on, and of the turns after the first message."""

    before: list[int]
    context: list[int]
    later: list[int]

    @property
    def tokens(self) -> int:
        return len(self.before) + len(self.context) + len(self.later)


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether prompts go through the tokenizer's chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def prompt_text(tokenizer: Any, messages: Sequence[str], answer_prefix: str) -> str:
    """Return a chat as text, up to the words with which the next answer begins.

    Parameters
    ----------
    messages : of the user and of the assistant in turn, the user's first and last.
    answer_prefix : these words, after a space; where there is no chat template they follow the last message.
    """
    prefix = answer_prefix.rstrip()
    if has_chat_template(tokenizer):
        roles = ("user", "assistant")
        chat = [{"role": roles[number % 2], "content": message} for number, message in enumerate(messages)]
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)) + prefix.lstrip()
    return "\n".join(messages) + prefix


class PromptMaker:
    """Draws the items of a task at a length, in both wordings.

    Parameters
    ----------
    length : tokens of prompt and answer together, as RULER counts them.
    count : number of items that will be drawn.

    Raises
    ------
    UsageError : if an item does not fit into the length.
    """

    def __init__(self, tokenizer: Any, task: SyntheticTask, length: int, count: int, material: Material) -> None:
        self._tokenizer, self._task, self._length, self._material = tokenizer, task, length, material
        self._wanted = length - task.answer_tokens
        self._filler = text_tokens(tokenizer, f"{NOISE}\n")
        least = task.least_units
        fewest = self._tokens_of(least, 0)
        # Items differ by less than this factor.
        longest = max(self._tokens_of(least, i) for i in range(count)) if _MARGIN * fewest > self._wanted else fewest
        if longest > self._wanted:
            raise UsageError(
                f"`task_lengths`={length} is too short for {task.name}: give {longest + task.answer_tokens} or more, or "
                "leave it out of `tasks`"
            )
        self._unit_tokens = max(1.0, (self._tokens_of(2 * least + 8, 0) - fewest) / (least + 8))
        self._units = least + int((self._wanted - fewest) / self._unit_tokens)

    def items(self, number: int) -> tuple[TaskItem, TaskItem]:
        """Return an item in the first and in the second wording: the same context and answers.

        The context has as many units as fit; what remains, less than a unit or so, is filled with the end of RULER's noise
        text.
        """
        best: tuple[Draft, list[_Pieces]] | None = None
        least_room = float("inf")
        units, tried = self._units, set[int]()
        while len(tried) < _TRIES and units not in tried:
            tried.add(units)
            draft, pieces = self._pieces(units, number)
            room = self._wanted - max(of_wording.tokens for of_wording in pieces)
            if 0 <= room < least_room:
                best, least_room, self._units = (draft, pieces), room, units
            whole = int(room // self._unit_tokens)
            units = max(self._task.least_units, units + (whole if room >= 0 else min(-1, whole)))
        draft, pieces = best or self._pieces(self._task.least_units, number)
        first, second = (self._item(draft, of_wording) for of_wording in pieces)
        return first, second

    def _item(self, draft: Draft, pieces: _Pieces) -> TaskItem:
        gap = self._wanted - pieces.tokens
        repeated = self._filler * -(-gap // len(self._filler))
        ids = (*pieces.before, *repeated[len(repeated) - gap :], *pieces.context, *pieces.later)
        return TaskItem(ids, draft.answers, max(1, len(pieces.later)), self._task.metric)

    def _tokens_of(self, units: int, number: int) -> int:
        return max(pieces.tokens for pieces in self._pieces(units, number)[1])

    def _pieces(self, units: int, number: int) -> tuple[Draft, list[_Pieces]]:
        rng = random.Random(f"{self._task.name} {self._length} {number}")
        draft = self._task.draft(rng, Size(self._length, units, number), self._material)
        return draft, [self._tokenized(draft, wording) for wording in self._task.wordings]

    def _tokenized(self, draft: Draft, wording: Wording) -> _Pieces:
        text = prompt_text(self._tokenizer, _messages(draft, wording), wording.answer_prefix.format(**draft.fields))
        before, _, rest = text.partition(_CONTEXT)
        context, _, later = rest.partition(_LATER)
        opening = [*text_prefix(self._tokenizer), *text_tokens(self._tokenizer, before)]
        return _Pieces(opening, *(text_tokens(self._tokenizer, part) for part in (context, later)))


def _messages(draft: Draft, wording: Wording) -> list[str]:
    """Return the user's messages and the assistant's earlier answers, with the places marked."""
    example = ""
    if draft.example is not None:
        shown = draft.example
        question = wording.instruction.format(context=shown.context, **shown.fields)
        example = f"{question}{wording.answer_prefix.format(**shown.fields).rstrip()} {shown.listed_answers()}\n\n"
    keys = [*(key for key, _ in draft.earlier), draft.fields.get("query", "")]
    opening = draft.fields | {"query": keys[0]}
    messages = [example + wording.instruction.format(context=_CONTEXT + draft.context, **opening)]
    for turn, (key, answer) in enumerate(draft.earlier):
        opening_words = wording.answer_prefix.format(query=key).strip()
        messages += [f"{'' if turn else _LATER}{opening_words} {answer}.", wording.follow_up.format(query=keys[turn + 1])]
    return messages
