"""Answers of a batch of items through one decode path, and their scores."""

from collections.abc import Sequence

import torch

from elastickv.evaluation.generations.divergence import end_tokens
from elastickv.evaluation.layer_progress import Progress
from elastickv.evaluation.prefill import Prefill, Tensor
from elastickv.evaluation.scoring import TOKENS_AT_ONCE, Open
from elastickv.evaluation.subject import Subject
from elastickv.evaluation.tasks.string_match import GROWING, METRICS
from elastickv.evaluation.tasks.task_prompts import TaskItem

# Decode steps, by kind of device, until answers are looked at: looking waits for the device and spells out every answer.
STEPS_PER_CHECK = {"cpu": 1, "cuda": 8}


def stepped_tokens(items: Sequence[TaskItem]) -> int:
    """Return the number of last tokens of each prompt of a batch that are read through the cache: equal for all rows."""
    return max(item.stepped for item in items)


def scored_answers(
    subject: Subject, items: Sequence[TaskItem], start: Prefill, decoding: Open, tokens: int, progress: Progress
) -> list[float]:
    """Return the score of each item's greedy answer, from 0 to 1.

    Decoding ends early where no score can change any more: all answers have ended, or match in full by a metric that a longer
    text does not lower.

    Parameters
    ----------
    items : with prompts of one length.
    start : of the prompts without the tokens that are read through the cache.
    tokens : the most tokens of an answer.
    """
    rows = torch.tensor([item.ids for item in items])
    stepped, answers = stepped_tokens(items), _Answers(subject, items)
    total = stepped + tokens - 1
    with decoding(start, total) as session:
        first, at_once = rows.shape[1] - stepped, TOKENS_AT_ONCE if session.takes_several else 1
        for begin in range(0, stepped - 1, at_once):
            end = min(begin + at_once, stepped - 1)
            session.read(rows[:, first + begin : first + end])
            progress(end, total)
        following, unseen = rows[:, -1], list[Tensor]()
        for step in range(tokens):
            following = session.step(following).argmax(-1)
            unseen.append(following)
            progress(stepped + step, total)
            if len(unseen) == STEPS_PER_CHECK.get(following.device.type, 1) or step == tokens - 1:
                answers.extend(torch.stack(unseen, 1).tolist())
                unseen.clear()
                if not answers.open:
                    break
    return answers.scores


class _Answers:
    """The answers of a batch as far as they have been looked at, and the rows whose score can still change."""

    def __init__(self, subject: Subject, items: Sequence[TaskItem]) -> None:
        self._subject, self._items = subject, items
        self._ends = end_tokens(subject.model) | _ends(subject.loaded.tokenizer)
        self._ids: list[list[int]] = [[] for _ in items]
        self.scores, self.open = [0.0] * len(items), set(range(len(items)))

    def extend(self, chosen: Sequence[Sequence[int]]) -> None:
        """Take the next tokens of every row, and score the rows that are open."""
        for row in sorted(self.open):
            item, own = self._items[row], self._ids[row]
            end = next((number for number, token in enumerate(chosen[row]) if token in self._ends), None)
            own += chosen[row][:end]
            if own:
                self.scores[row] = score_of(self._subject, item, own)
            if end is not None or (self.scores[row] == 1 and item.metric in GROWING):
                self.open.discard(row)


def score_of(subject: Subject, item: TaskItem, ids: Sequence[int]) -> float:
    """Return the score of an answer's tokens."""
    text = subject.loaded.tokenizer.decode(list(ids), skip_special_tokens=True)
    return METRICS[item.metric](text, item.answers)


def _ends(tokenizer: object) -> set[int]:
    end = getattr(tokenizer, "eos_token_id", None)
    return set() if end is None else {int(end)}
