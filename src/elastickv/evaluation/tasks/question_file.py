"""Questions from a file, as LongBench and the like have them: a line of JSON each, with `context`, `question` and `answers`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastickv import inputs
from elastickv.errors import UsageError
from elastickv.evaluation.tasks.string_match import METRICS
from elastickv.evaluation.tasks.synthetic_task import Wording
from elastickv.evaluation.tasks.task_prompts import TaskItem, prompt_text
from elastickv.transformers.tokenization import prompt_tokens

ANSWER_TOKENS = 128
DEFAULT_METRIC = "f1"
# The first one's words are those of LongBench's prompts for questions on one passage (Bai et al. 2023, `dataset2prompt.json`).
WORDINGS = (
    Wording(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the above "
        "text, only give me the answer and do not output any other words.\n\nQuestion: {question}",
        "\nAnswer:",
    ),
    Wording(
        "Here is a text, and after it a question on the text.\n\n{context}\n\nGive the shortest answer that is right, and "
        "nothing else.\n\nQuestion: {question}",
        "\nAnswer:",
    ),
)
_FORM = '{"context": "...", "question": "...", "answers": ["..."]}'


@dataclass(frozen=True)
class Question:
    """A line of a file.

    Attributes
    ----------
    line : its number, from 1.
    metric : a name in `METRICS`.
    """

    line: int
    context: str
    question: str
    answers: tuple[str, ...]
    metric: str

    def items(self, tokenizer: Any) -> tuple[TaskItem, TaskItem]:
        """Return the prompts in the first and in the second wording."""
        fields = {"context": self.context, "question": self.question}
        texts = (prompt_text(tokenizer, [w.instruction.format(**fields)], w.answer_prefix) for w in WORDINGS)
        first, second = (TaskItem(tuple(prompt_tokens(tokenizer, text)), self.answers, 1, self.metric) for text in texts)
        return first, second


def read_questions(path: Path) -> list[Question]:
    """Read a file of questions; keys other than `context`, `question`, `answers` and `metric` are ignored.

    `answers` is a list of strings, or one string. `metric` is `f1` (the default), `exact`, `part` or `all`. Empty lines are
    skipped.

    Raises
    ------
    UsageError : naming the file, the line and what is wrong with it.
    """
    text = inputs.read_text(path, f"dataset {path}", f"give a UTF-8 file with a line {_FORM} for each question")
    # Only line feeds end a line: texts may hold other separators that str.splitlines knows.
    lines = enumerate(text.split("\n"), 1)
    questions = [_question(path, number, line) for number, line in lines if line.strip()]
    if not questions:
        raise UsageError(f"dataset {path} is empty: give a line {_FORM} for each question")
    return questions


def _question(path: Path, number: int, line: str) -> Question:
    where = f"dataset {path}, line {number}"
    try:
        value = inputs.parse_json(line)
    except ValueError as error:
        reason = str(error).removeprefix("line 1, ")
        raise UsageError(f"{where} is no JSON ({reason}): write {_FORM} on one line") from None
    if not isinstance(value, dict):
        raise UsageError(f"{where} is no JSON object: write {_FORM} on one line")
    missing = [name for name in ("context", "question", "answers") if name not in value]
    if missing:
        raise UsageError(f"{where} has no {' and no '.join(missing)}: write {_FORM}")
    for name in ("context", "question"):
        if not isinstance(value[name], str):
            raise UsageError(f"{where}: {name} is no string: write {_FORM}")
    answers = [value["answers"]] if isinstance(value["answers"], str) else value["answers"]
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise UsageError(f"{where}: answers is no list of strings with text: write {_FORM}")
    metric = value.get("metric", DEFAULT_METRIC)
    if not isinstance(metric, str) or metric not in METRICS:
        raise UsageError(f"{where}: metric {json.dumps(metric)} is unknown: choose {', '.join(METRICS)}")
    return Question(number, value["context"], value["question"], tuple(answers), metric)
