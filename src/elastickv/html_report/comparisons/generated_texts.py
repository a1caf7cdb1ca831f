"""Texts that caches generated: those of one model and context, full attention first."""

from collections.abc import Sequence
from dataclasses import dataclass

from elastickv.html_report.report_data import Evaluation
from elastickv.results.kinds.evaluation_result import GenerationRow


@dataclass(frozen=True)
class GeneratedTexts:
    """What caches generated with one model, text and context."""

    model: str
    context: int
    rows: Sequence[GenerationRow]


def generated_texts_of(evaluations: Sequence[Evaluation]) -> list[GeneratedTexts]:
    """Return the texts of each evaluation and context: full attention's random numbers are those of its own evaluation."""
    several = len({evaluation.method for evaluation in evaluations}) > 1
    return [
        GeneratedTexts(
            f"{evaluation.model}, {evaluation.method}" if several else evaluation.model,
            context,
            [row for row in evaluation.generations if row.context == context],
        )
        for evaluation in evaluations
        for context in dict.fromkeys(row.context for row in evaluation.generations)
    ]
