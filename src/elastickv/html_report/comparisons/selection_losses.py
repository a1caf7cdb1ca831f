"""Selections that were compared: those of one model, text and context, beside our own recipes at each C."""

from collections.abc import Sequence
from dataclasses import dataclass

from elastickv.html_report.report_data import Evaluation, Loss

OWN = "ElasticKV"


@dataclass(frozen=True)
class ComparedSelections:
    """The losses of selections and of our recipes with one model and context: method -> losses by read bytes."""

    model: str
    context: int
    curves: dict[str, list[Loss]]


def compared_selections(evaluations: Sequence[Evaluation]) -> list[ComparedSelections]:
    """Return a comparison for each model and context; what was evaluated on other texts or in another dtype is another one."""
    several = len({evaluation.method for evaluation in evaluations}) > 1
    together: dict[tuple[str, int], dict[str, list[Loss]]] = {}
    for evaluation in evaluations:
        if not any(loss.selection for loss in evaluation.losses):
            continue
        model = f"{evaluation.model}, {evaluation.method}" if several else evaluation.model
        calibrated = "calibrated" if evaluation.calibration else "not calibrated"
        for loss in evaluation.losses:
            if loss.read_bytes and loss.stored_bits is None:
                curves = together.setdefault((model, loss.context), {})
                curves.setdefault(loss.selection or f"{OWN}, {calibrated}", []).append(loss)
    return [
        ComparedSelections(
            model, context, {name: sorted(losses, key=lambda loss: loss.read_bytes or 0) for name, losses in curves.items()}
        )
        for (model, context), curves in together.items()
    ]
