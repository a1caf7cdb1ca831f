"""Methods that were compared: KV formats, selections and our recipes with one model, text and context, by bits."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

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


class MethodPoint(Protocol):
    """A method's bits for each element of K and V, of which a dense cache stores and reads 16, and what it costs."""

    @property
    def stored_bits(self) -> float:
        """Bits that are stored."""

    @property
    def read_bits(self) -> float:
        """Bits that a step reads."""

    @property
    def cost(self) -> float:
        """What is to be small."""


Point = TypeVar("Point", bound=MethodPoint)
Bits = Callable[[MethodPoint], float]


@dataclass(frozen=True)
class MethodLoss:
    """What predictions lose by one method."""

    method: str
    loss: Loss
    stored_bits: float
    read_bits: float

    @property
    def cost(self) -> float:
        """The KL divergence."""
        return self.loss.kl.estimate


def stored_bits(of: MethodPoint) -> float:
    """Return the bits that are stored."""
    return of.stored_bits


def read_bits(of: MethodPoint) -> float:
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


def front(points: Iterable[Point], bits: Bits) -> list[Point]:
    """Return the Pareto front by bits: points of which no other has both fewer bits and a smaller cost."""
    best: list[Point] = []
    for one in sorted(points, key=lambda one: (bits(one), one.cost)):
        if not best or one.cost < best[-1].cost:
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
    return [ComparedMethods(model, context, own_first(curves)) for (model, context), curves in together.items()]


def own_first(curves: Mapping[str, Sequence[Point]]) -> dict[str, list[Point]]:
    """Return curves of methods by stored bits, ours first."""
    ordered = sorted(curves, key=lambda name: not name.startswith(OWN))
    return {name: sorted(curves[name], key=lambda one: (one.stored_bits, one.read_bits)) for name in ordered}


def _measured(loss: Loss, calibrated: bool) -> MethodLoss | None:
    """Return a loss with its bits; None for a cache whose bytes are not counted."""
    stored = loss.stored_bits or (DENSE_BITS / loss.stored if loss.stored else None)
    # What a published format stores is read at every step.
    read = DENSE_BITS / loss.read if loss.read else stored
    if stored is None or read is None:
        return None
    own = loss.read is not None and not loss.selection
    return MethodLoss(method_name(loss.cache, loss.selection, own, calibrated), loss, stored, read)


def method_name(cache: str, selection: str | None, own: bool, calibrated: bool) -> str:
    """Return the method that a cache belongs to.

    Parameters
    ----------
    cache : its name in a result.
    selection : the published selection that it has.
    own : whether it has a recipe of ours.
    calibrated : whether the result's recipes are calibrated.
    """
    if selection:
        return selection
    if cache.startswith(REFERENCE):
        return BY_REFERENCE
    if own:
        return OWN if calibrated else f"{OWN}, not calibrated"
    return next((name for prefix, name in _FAMILIES.items() if cache.startswith(prefix)), cache)
