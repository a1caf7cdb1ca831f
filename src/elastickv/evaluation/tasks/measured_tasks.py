"""Tasks and files of questions through full attention in both wordings, and through every cache."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastickv.benchmark.reporter import Reporter
from elastickv.errors import UsageError
from elastickv.evaluation import sessions
from elastickv.evaluation.evaluation_options import EvaluationOptions
from elastickv.evaluation.prefill import prefill
from elastickv.evaluation.recipes_by_ratio import Span
from elastickv.evaluation.scoring import Open
from elastickv.evaluation.subject import DecodePath, Subject
from elastickv.evaluation.tasks import question_file
from elastickv.evaluation.tasks.paired_scores import FULL, SECOND_WORDING, paired_record
from elastickv.evaluation.tasks.question_file import Question, read_questions
from elastickv.evaluation.tasks.shipped_material import shipped_material
from elastickv.evaluation.tasks.synthetic_task import SyntheticTask
from elastickv.evaluation.tasks.task_answers import scored_answers, stepped_tokens
from elastickv.evaluation.tasks.task_prompts import PromptMaker, TaskItem, has_chat_template
from elastickv.evaluation.tasks.task_registry import TASKS

Paths = Callable[[Span], tuple[list[DecodePath], list[str]]]
Pair = tuple[TaskItem, TaskItem]
# Questions of a file whose prompts differ by less share a plan: it meets each ratio for the shortest of them.
_ALIKE = 1.125


@dataclass(frozen=True)
class PlannedTask:
    """A task at one length, or the questions of a file that have one metric.

    Attributes
    ----------
    name, source, metric : as in results.
    groups : batches of items whose prompts have similar lengths: those of a group share the caches' recipes.
    """

    name: str
    source: str
    metric: str
    answer_tokens: int
    count: int
    tokens: int
    item: Callable[[int], Pair]
    groups: Sequence[Sequence[Sequence[int]]]


def planned_tasks(subject: Subject, options: EvaluationOptions) -> list[PlannedTask]:
    """Return what is to be measured.

    Raises
    ------
    UsageError : before anything is measured, if a length is too short for a task or too long for the model, or a file of
        questions cannot be read.
    """
    planned = []
    for length in options.task_lengths if options.tasks else ():
        subject.check_room(length)
        planned += [_synthetic(subject, TASKS[name], length, options) for name in options.tasks]
    for name in options.datasets:
        planned += _of_file(subject, Path(name))
    return planned


def task_rows(subject: Subject, planned: Sequence[PlannedTask], paths: Paths, progress: Reporter) -> Iterator[dict[str, Any]]:
    """Yield the result of each task as JSON values.

    Parameters
    ----------
    paths : a span -> the ways to decode it, and the reasons why some ratios have none.
    """
    for task in planned:
        yield _task_row(subject, task, paths, progress)


def _synthetic(subject: Subject, task: SyntheticTask, length: int, options: EvaluationOptions) -> PlannedTask:
    maker = PromptMaker(subject.loaded.tokenizer, task, length, options.task_items, shipped_material())
    count, size = options.task_items, options.task_batch
    batches = [range(first, min(first + size, count)) for first in range(0, count, size)]
    return PlannedTask(task.name, task.source, task.metric, task.answer_tokens, count, length, maker.items, [batches])


def _of_file(subject: Subject, path: Path) -> Iterator[PlannedTask]:
    questions = read_questions(path)
    pairs = [question.items(subject.loaded.tokenizer) for question in questions]
    for question, pair in zip(questions, pairs, strict=True):
        _check_room(subject, path, question, pair)
    for metric in dict.fromkeys(question.metric for question in questions):
        mine = [pair for question, pair in zip(questions, pairs, strict=True) if question.metric == metric]
        lengths = [len(first.ids) for first, _ in mine]
        yield PlannedTask(
            path.name,
            f"questions of {path.name}",
            metric,
            question_file.ANSWER_TOKENS,
            len(mine),
            max(lengths) + question_file.ANSWER_TOKENS,
            mine.__getitem__,
            _groups(lengths),
        )


def _check_room(subject: Subject, path: Path, question: Question, pair: Pair) -> None:
    needed = max(len(item.ids) for item in pair) + question_file.ANSWER_TOKENS
    if subject.positions is not None and needed > subject.positions:
        raise UsageError(
            f"dataset {path}, line {question.line} needs {needed} tokens with the answer, and {subject.loaded.name} has "
            f"{subject.positions} positions: shorten its context, or leave it out"
        )


def _groups(lengths: Sequence[int]) -> list[list[list[int]]]:
    """Return items by similar lengths of their prompts, and in each group those of equal length together."""
    groups: list[list[list[int]]] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        if not groups or lengths[number] > _ALIKE * lengths[groups[-1][0][0]]:
            groups.append([])
        if groups[-1] and lengths[groups[-1][-1][0]] == lengths[number]:
            groups[-1][-1].append(number)
        else:
            groups[-1].append([number])
    return groups


def _task_row(subject: Subject, task: PlannedTask, paths: Paths, progress: Reporter) -> dict[str, Any]:
    began = time.monotonic()
    full, reworded = [0.0] * task.count, [0.0] * task.count
    caches: dict[str, list[float | None]] = {}
    figures: dict[str, dict[str, Any]] = {}
    skipped: list[str] = []
    done = 0
    exact: Open = lambda begun, _: sessions.stock(subject.model, begun)  # noqa: E731
    for group in task.groups:
        group_paths: list[DecodePath] | None = None
        for batch in group:
            pairs = [task.item(number) for number in batch]
            firsts, seconds = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            if group_paths is None:
                stepped = stepped_tokens(firsts)
                group_paths, reasons = paths(Span(len(firsts[0].ids) - stepped, stepped + task.answer_tokens - 1))
                skipped += reasons
            name = f"{task.name} in {task.tokens} tokens, items {done + 1} to {done + len(batch)} of {task.count}"
            runner = _Batch(subject, firsts, task.answer_tokens, name, progress)
            _put(full, batch, runner.scores(FULL, exact))
            for path in group_paths:
                scores = caches.setdefault(path.name, [None] * task.count)
                figures.setdefault(path.name, path.figures)
                _put(scores, batch, runner.scores(path.name, path.decoding))
            del runner  # its keys and values take no memory beside those of the second wording
            # Prompts of a file differ in length in the second wording, even where they are equally long in the first.
            for numbers, items in _equally_long(batch, seconds):
                _put(
                    reworded, numbers, _Batch(subject, items, task.answer_tokens, name, progress).scores(SECOND_WORDING, exact)
                )
            done += len(batch)
    return {
        "task": task.name,
        "source": task.source,
        "metric": task.metric,
        "tokens": task.tokens,
        "answer_tokens": task.answer_tokens,
        "items": task.count,
        "chat_template": has_chat_template(subject.loaded.tokenizer),
        "caches": [
            paired_record(FULL, full, full, {}),
            paired_record(SECOND_WORDING, reworded, full, {}),
            *(paired_record(name, scores, full, figures[name]) for name, scores in _complete(caches).items()),
        ],
        "skipped": list(dict.fromkeys([*skipped, *_partly(caches)])),
        "seconds": time.monotonic() - began,
    }


class _Batch:
    """Items with prompts of one length, read once with exact attention."""

    def __init__(self, subject: Subject, items: Sequence[TaskItem], tokens: int, name: str, progress: Reporter) -> None:
        self._subject, self._items, self._tokens, self._name, self._progress = subject, items, tokens, name, progress
        stepped = stepped_tokens(items)
        read = [item.ids[: len(item.ids) - stepped] for item in items]
        progress.phase(name)
        self._start = prefill(subject.model, read, len(read[0]), 1, progress.progress)

    def scores(self, cache: str, decoding: Open) -> list[float]:
        self._progress.phase(f"{self._name}, {cache}")
        return scored_answers(self._subject, self._items, self._start, decoding, self._tokens, self._progress.progress)


def _put(scores: list[Any], numbers: Sequence[int], of_batch: Sequence[float]) -> None:
    for number, score in zip(numbers, of_batch, strict=True):
        scores[number] = score


def _equally_long(numbers: Sequence[int], items: Sequence[TaskItem]) -> Iterator[tuple[list[int], list[TaskItem]]]:
    by_length: dict[int, tuple[list[int], list[TaskItem]]] = {}
    for number, item in zip(numbers, items, strict=True):
        of_length = by_length.setdefault(len(item.ids), ([], []))
        of_length[0].append(number)
        of_length[1].append(item)
    yield from by_length.values()


def _complete(caches: dict[str, list[float | None]]) -> dict[str, list[float]]:
    """Return the caches that have a score for every item."""
    return {name: [s for s in scores if s is not None] for name, scores in caches.items() if None not in scores}


def _partly(caches: dict[str, list[float | None]]) -> Iterator[str]:
    for name, scores in caches.items():
        if None in scores:
            yield f"{name}: no score, as it has no recipe for {scores.count(None)} of {len(scores)} items, which are shorter"
