"""Methods that were compared: KV formats, selections and our recipes with one model, text and context, by bits."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from elastickv.evaluation.evaluation_options import REFERENCE
from elastickv.html_report.report_data import Evaluation, Loss

OWN = "ElasticKV"
BY_REFERENCE = f"{OWN} by reference"
DENSE_BITS = 16
_FAMILIES = {
    "turboquant": "TurboQuant",
    "kivi": "KIVI",
    "kvarn": "KVarN",
    "q4_0": "GGUF blocks",
    "q8_0": "GGUF blocks",
    "nvfp4": "fp4",
    "mxfp4": "fp4",
    "fp8_": "fp8",
    "int8_per_token_head": "integers per token-head",
    "int4_per_token_head": "integers per token-head",
}


@dataclass(frozen=True)
class MethodLoss:
    """What one method costs, and its bits for each element of K and V: a dense cache stores and reads 16."""

    method: str
    loss: Loss
    stored_bits: float
    read_bits: float


Bits = Callable[[MethodLoss], float]


def stored_bits(of: MethodLoss) -> float:
    """Return the bits that are stored."""
    return of.stored_bits


def read_bits(of: MethodLoss) -> float:
    """Return the bits that a step reads."""
    return of.read_bits


@dataclass(frozen=True)
class ComparedMethods:
    """The losses of all methods with one model and context: method -> losses by stored bits, our own first."""

    model: str
    context: int
    curves: dict[str, list[MethodLoss]]

    @property
    def losses(self) -> list[MethodLoss]:
        """Those of all methods."""
        return [one for curve in self.curves.values() for one in curve]

    @property
    def formats(self) -> list[Loss]:
        """KV formats that were named, by stored bits."""
        losses = [one.loss for one in self.losses if one.loss.stored_bits is not None]
        return sorted(losses, key=lambda loss: (loss.stored_bits or 0, loss.kl.estimate))


def front(losses: Iterable[MethodLoss], bits: Bits) -> list[MethodLoss]:
    """Return the Pareto front by bits: losses of which no other has both fewer bits and a smaller KL divergence."""
    best: list[MethodLoss] = []
    for one in sorted(losses, key=lambda one: (bits(one), one.loss.kl.estimate)):
        if not best or one.loss.kl.estimate < best[-1].loss.kl.estimate:
            best.append(one)
    return best


def compared_methods(evaluations: Sequence[Evaluation]) -> list[ComparedMethods]:
    """Return a comparison for each model and context with a format or a selection.

    What was evaluated on other texts or in another dtype is another one.
    """
    several = len({evaluation.method for evaluation in evaluations}) > 1
    together: dict[tuple[str, int], dict[str, list[MethodLoss]]] = {}
    for evaluation in evaluations:
        if not any(loss.selection or loss.stored_bits for loss in evaluation.losses):
            continue
        model = f"{evaluation.model}, {evaluation.method}" if several else evaluation.model
        for loss in evaluation.losses:
            measured = _measured(loss, bool(evaluation.calibration))
            if measured is not None:
                curves = together.setdefault((model, loss.context), {})
                curves.setdefault(measured.method, []).append(measured)
    return [
        ComparedMethods(
            model,
            context,
            {
                name: sorted(curves[name], key=lambda one: (one.stored_bits, one.read_bits))
                for name in sorted(curves, key=lambda name: not name.startswith(OWN))
            },
        )
        for (model, context), curves in together.items()
    ]


def _measured(loss: Loss, calibrated: bool) -> MethodLoss | None:
    """Return a loss with its bits; None for a cache whose bytes are not counted."""
    stored = loss.stored_bits or (DENSE_BITS / loss.stored if loss.stored else None)
    # What a published format stores is read at every step.
    read = DENSE_BITS / loss.read if loss.read else stored
    if stored is None or read is None:
        return None
    if loss.selection:
        return MethodLoss(loss.selection, loss, stored, read)
    if loss.cache.startswith(REFERENCE):
        return MethodLoss(BY_REFERENCE, loss, stored, read)
    if loss.read is not None:
        return MethodLoss(OWN if calibrated else f"{OWN}, not calibrated", loss, stored, read)
    family = next((name for prefix, name in _FAMILIES.items() if loss.cache.startswith(prefix)), loss.cache)
    return MethodLoss(family, loss, stored, read)
