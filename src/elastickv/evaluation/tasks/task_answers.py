"""Answers of a batch of items through one decode path, and their scores."""

from collections.abc import Sequence

import torch

from elastickv.evaluation.generations.divergence import end_tokens
from elastickv.evaluation.layer_progress import Progress
from elastickv.evaluation.prefill import Prefill
from elastickv.evaluation.scoring import TOKENS_AT_ONCE, Open
from elastickv.evaluation.subject import Subject
from elastickv.evaluation.tasks.string_match import GROWING, METRICS
from elastickv.evaluation.tasks.task_prompts import TaskItem


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
    stepped = stepped_tokens(items)
    ends = end_tokens(subject.model) | _ends(subject.loaded.tokenizer)
    answers: list[list[int]] = [[] for _ in items]
    scores, open_rows = [0.0] * len(items), set(range(len(items)))
    total = stepped + tokens - 1
    with decoding(start, total) as session:
        first, at_once = rows.shape[1] - stepped, TOKENS_AT_ONCE if session.takes_several else 1
        for begin in range(0, stepped - 1, at_once):
            end = min(begin + at_once, stepped - 1)
            session.read(rows[:, first + begin : first + end])
            progress(end, total)
        following = rows[:, -1]
        for step in range(tokens):
            following = session.step(following).argmax(-1).cpu()
            for row in sorted(open_rows):
                token = int(following[row])
                if token not in ends:
                    answers[row].append(token)
                    scores[row] = score_of(subject, items[row], answers[row])
                if token in ends or (scores[row] == 1 and items[row].metric in GROWING):
                    open_rows.discard(row)
            progress(stepped + step, total)
            if not open_rows:
                break
    return scores


def score_of(subject: Subject, item: TaskItem, ids: Sequence[int]) -> float:
    """Return the score of an answer's tokens."""
    text = subject.loaded.tokenizer.decode(list(ids), skip_special_tokens=True)
    return METRICS[item.metric](text, item.answers)


def _ends(tokenizer: object) -> set[int]:
    end = getattr(tokenizer, "eos_token_id", None)
    return set() if end is None else {int(end)}
