"""Tasks that were compared: those of one model and length."""

from collections.abc import Sequence
from dataclasses import dataclass

from elastickv.html_report.report_data import Evaluation
from elastickv.results.kinds.evaluation_result import TaskRow


@dataclass(frozen=True)
class ComparedTasks:
    """The scores of one model on tasks of one length."""

    model: str
    tokens: int
    rows: Sequence[TaskRow]


def compared_tasks(evaluations: Sequence[Evaluation]) -> list[ComparedTasks]:
    """Return a comparison for each result and length; another dtype or calibration is another result."""
    several = len([evaluation for evaluation in evaluations if evaluation.tasks]) > 1
    together: dict[tuple[str, int], list[TaskRow]] = {}
    for number, evaluation in enumerate(evaluations, 1):
        name = f"{evaluation.model}, {evaluation.dtype}, result {number}" if several else evaluation.model
        for task in evaluation.tasks:
            together.setdefault((name, task.tokens), []).append(task)
    return [ComparedTasks(model, tokens, rows) for (model, tokens), rows in together.items()]
