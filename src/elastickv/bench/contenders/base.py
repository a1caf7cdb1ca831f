"""What a contender is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from elastickv.backends import Backend
from elastickv.bench.contenders.rotation import Rotation
from elastickv.recipe import AttentionShape


@dataclass(frozen=True)
class Contender:
    """One way of decoding a layer, ready to be timed.

    Attributes
    ----------
    name : such as 'dense-bf16', 'elastic', 'torch-sdpa-flash'.
    kind : 'dense', 'elastic' or 'peer'.
    version : of the software that runs it.
    dtype : of the keys and values it reads, or the recipe's cold format.
    kv_bytes : bytes of K and V read in one step.
    rotation : what one sample goes round.
    sample : take one sample; returns milliseconds per decode step.
    captured : whether a sample is one captured graph.
    nodes : that graph's nodes.
    kernels_per_step : kernel launches of one decode step; None where the contender does not tell.
    check : raise NonFiniteError if the last sample left an output that is not finite.
    close : give back the memory; no sample can be taken afterwards.
    """

    name: str
    kind: str
    version: str
    dtype: str
    kv_bytes: float
    rotation: Rotation
    sample: Callable[[], float]
    captured: bool
    nodes: int | None
    kernels_per_step: int | None
    check: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None


class Peer(Protocol):
    """A family of attention implementations of somebody else: one file in this folder, one line in `peers`."""

    name: str

    def version(self) -> str | None:
        """Return the installed version, or None where the package is not installed."""

    def contenders(
        self, backend: Backend, shape: AttentionShape, context: int, rotation: Rotation, seed: int, graph: bool
    ) -> tuple[list[Contender], dict[str, str]]:
        """Return the variants that run this shape on the back end's device, and why each other variant does not."""
