"""KV formats that were compared: those of one model, text and context, and which of them no other beats."""

from collections.abc import Sequence
from dataclasses import dataclass

from elastickv.html_report.report_data import Evaluation, Loss


@dataclass(frozen=True)
class ComparedFormats:
    """The losses of KV formats with one model and context, by stored bits."""

    model: str
    context: int
    losses: Sequence[Loss]

    @property
    def front(self) -> list[Loss]:
        """The Pareto front: formats of which no other has both fewer stored bits and a smaller KL divergence."""
        best: list[Loss] = []
        for loss in self.losses:
            if not best or loss.kl.estimate < best[-1].kl.estimate:
                best.append(loss)
        return best


def compared_formats(evaluations: Sequence[Evaluation]) -> list[ComparedFormats]:
    """Return a comparison for each model and context; what was evaluated on other texts or in another dtype is another one."""
    several = len({evaluation.method for evaluation in evaluations}) > 1
    together: dict[tuple[str, int], list[Loss]] = {}
    for evaluation in evaluations:
        model = f"{evaluation.model}, {evaluation.method}" if several else evaluation.model
        for loss in evaluation.losses:
            if loss.stored_bits is not None:
                together.setdefault((model, loss.context), []).append(loss)
    return [
        ComparedFormats(model, context, sorted(losses, key=lambda loss: (loss.stored_bits or 0, loss.kl.estimate)))
        for (model, context), losses in together.items()
    ]
