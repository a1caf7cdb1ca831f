"""What a back end offers to the benchmark and to the cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from elastickv.backends.feedback import Feedback
from elastickv.kvcache.layer import Float32, LayerCache
from elastickv.recipe import AttentionShape, Recipe


@dataclass(frozen=True)
class DeviceInfo:
    """What the figures are about.

    Attributes
    ----------
    kind : 'cpu' or 'cuda'.
    name : the product's name.
    sm : compute capability such as '9.0'; None on a CPU.
    compute_units : multiprocessors, or threads in use.
    theoretical_bw_gbs : 10^9 bytes per second from the memory clock and bus width; None where the device tells none.
    last_level_cache_bytes : what a cold rotation must exceed.
    memory_bytes, free_bytes : of the device.
    driver : driver version; None on a CPU.
    """

    kind: str
    name: str
    sm: str | None
    compute_units: int
    theoretical_bw_gbs: float | None
    last_level_cache_bytes: int
    memory_bytes: int
    free_bytes: int
    driver: str | None


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of a device. The read ceiling must not be beaten by an attention kernel.

    Attributes
    ----------
    read_gbs : 10^9 bytes per second of a tuned read-only stream far larger than the last-level cache.
    copy_gbs : bytes read and written per second of a copy.
    flops : float32 multiply-adds per second x 2 on the units that the attention kernels use.
    """

    read_gbs: float
    copy_gbs: float
    flops: float

    def at_least(self, other: "Ceilings") -> "Ceilings":
        """Return the higher of two measurements of each limit: noise only ever lowers one."""
        return Ceilings(max(self.read_gbs, other.read_gbs), max(self.copy_gbs, other.copy_gbs), max(self.flops, other.flops))


class Program(Protocol):
    """A fixed sequence of decode steps, launched as a whole and timed on the device.

    Attributes
    ----------
    captured : whether a launch is one captured graph.
    nodes : nodes of that graph; None where there is none.
    kernels_per_step : kernel launches of one decode step of one layer.
    """

    captured: bool
    nodes: int | None
    kernels_per_step: int

    def run(self, launches: int = 1) -> list[float]:
        """Launch `launches` times in sequence and return the milliseconds of each."""

    def reset(self) -> None:
        """Rewind the program's caches to where they were when it was made."""

    def outputs(self) -> list[Float32]:
        """Return, for each cache, the (batch, query_heads, head_dim) outputs of the last launch's last step on it."""


class Backend(Protocol):
    """One device that runs decode attention."""

    name: str

    @property
    def device(self) -> DeviceInfo: ...

    def cache(self, shape: AttentionShape, capacity: int, dtype: str, recipe: Recipe, anchor_offset: int = 0) -> LayerCache:
        """Allocate the cache of one layer.

        Parameters
        ----------
        phase : steps by which the layer's anchors come early (see `LayerCache`), 0 to recipe.anchor_every - 1.

        Raises
        ------
        UsageError : if no kernel supports the combination, or it does not fit the device; before any allocation.
        ValueError : if the phase is out of range.
        """

    def cache_bytes(self, shape: AttentionShape, capacity: int, dtype: str, recipe: Recipe) -> int:
        """Return the device bytes that `cache` would allocate, its scratch included."""

    def attention(self, caches: Sequence[LayerCache], queries: Sequence[Float32], steps: int, graph: bool) -> Program:
        """Return a program of `steps` decodes going round `caches`, each with its (batch, query_heads, head_dim) queries."""

    def cycle(self, caches: Sequence[LayerCache], first: Float32, feedback: Feedback, graph: bool) -> Program:
        """Return a program whose launch is one token through all `caches` as layers.

        Each layer maps the output before it (of the layer below; for the first layer, of the last layer one token ago;
        `first`, (batch, query_heads, head_dim), to begin with) through `feedback`, appends the key and value and decodes.
        """

    def ceilings(self) -> Ceilings:
        """Measure the device's limits (about a second)."""
