"""The interfaces of contenders and peers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from elastickv.backends import DeviceInfo
from elastickv.benchmark.contenders.rotation import Rotation, as_cold
from elastickv.errors import UsageError
from elastickv.kvcache.error_metrics import ErrorSummary
from elastickv.recipe import DTYPES, AttentionShape


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
    error : of a peer's output, against float64 attention on the keys and values that it reads.
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
    error: ErrorSummary | None = None

    @property
    def is_dense(self) -> bool:
        """Whether it reads every key and value in 16 or 32 bit: only then it can be the baseline."""
        return self.kind != "elastic" and self.dtype in DTYPES


@dataclass(frozen=True)
class PeerWork:
    """The work of every peer: that of our dense contender.

    Attributes
    ----------
    device, index : where it runs; the index is that of a CUDA device.
    shape, context : of the attention, one query per sequence over the whole context.
    rotation : of our fastest dense contender.
    seed : of the random queries, keys and values.
    graph : whether to capture a CUDA graph.
    shortage : returns why work of some seconds does not fit into the run's time limit; None where it does.
    """

    device: DeviceInfo
    index: int
    shape: AttentionShape
    context: int
    rotation: Rotation
    seed: int
    graph: bool
    shortage: Callable[[float], str | None] = field(default=lambda seconds: None, compare=False)

    def require_time(self, seconds: float) -> None:
        """Refuse work of about `seconds` that does not fit into the run's time limit.

        Raises
        ------
        UsageError : saying how long it takes and what is left.
        """
        reason = self.shortage(seconds)
        if reason is not None:
            raise UsageError(reason)

    def rotation_of(self, kv_bytes: float) -> Rotation:
        """Return the rotation of a peer that reads `kv_bytes` a step: as cold as ours."""
        return as_cold(self.rotation, kv_bytes, self.device.last_level_cache_bytes)


# Prepares a variant, or says why it cannot run the work. It may also raise: the error's message is then the reason.
Variant = Callable[[], Contender] | str


class Peer(Protocol):
    """A family of third-party attention implementations: one file in this folder, one line in `peers`.

    The names of its variants begin with its own.
    """

    name: str

    def version(self) -> str | None:
        """Return the installed version, or None where the package is not installed."""

    def variants(self, work: PeerWork) -> dict[str, Variant]:
        """Return every variant by name."""
