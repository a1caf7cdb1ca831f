"""What a backend implements for the benchmark and for a model's cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from elastickv.backends.feedback import Feedback
from elastickv.kvcache.gptq import LayerCompensation
from elastickv.kvcache.protocol import LayerCache
from elastickv.kvcache.tensor_view import Float32
from elastickv.recipe import AttentionShape, Recipe


@dataclass(frozen=True)
class DeviceInfo:
    """The device that measurements were taken on.

    Attributes
    ----------
    kind : 'cpu' or 'cuda'.
    name : the product's name.
    sm : compute capability such as '9.0'; None on a CPU.
    compute_units : multiprocessors, or threads in use.
    theoretical_bw_gbs : 10^9 bytes per second from the memory clock and bus width; None if unknown.
    last_level_cache_bytes : size that the data of a cold measurement must exceed.
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
    """Measured limits of a device. No attention kernel may beat the read ceiling.

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
        """Return the higher of two measurements of each limit: noise can only lower them."""
        return Ceilings(max(self.read_gbs, other.read_gbs), max(self.copy_gbs, other.copy_gbs), max(self.flops, other.flops))


class Program(Protocol):
    """A fixed sequence of decode steps, launched at once and timed on the device.

    Attributes
    ----------
    captured : whether a launch is one captured graph.
    nodes : nodes of that graph; None without a graph.
    kernels_per_step : kernel launches of one decode step of one layer.
    """

    captured: bool
    nodes: int | None
    kernels_per_step: int

    def run(self, launches: int = 1) -> list[float]:
        """Launch `launches` times in sequence and return the milliseconds of each."""

    def reset(self) -> None:
        """Rewind the program's caches to their state when the program was made."""

    def outputs(self) -> list[Float32]:
        """Return, for each cache, the (batch, query_heads, head_dim) outputs of the last launch's last step on it."""


class Reporter(Protocol):
    """Receives the phases and the progress of a run, or of what a backend does before it can run."""

    def phase(self, name: str) -> None:
        """Begin a phase."""

    def progress(self, done: int, total: int) -> None:
        """Show that `done` of `total` steps of the phase are done."""


class DeviceMemory(Protocol):
    """A device allocation, freed with the object.

    Attributes
    ----------
    pointer : its address.
    n_bytes : its size.
    """

    @property
    def pointer(self) -> int: ...
    @property
    def n_bytes(self) -> int: ...


class Allocator(Protocol):
    """A source of device memory."""

    def allocate(self, n_bytes: int) -> DeviceMemory:
        """Return memory of at least 16-byte alignment, for use on the device's present stream."""

    def free_bytes(self) -> int:
        """Return the bytes that can still be allocated."""


class Backend(Protocol):
    """One device that runs decode attention. Its caches may share scratch memory, so they decode one after the other."""

    name: str

    @property
    def device(self) -> DeviceInfo: ...

    def cache(
        self,
        shape: AttentionShape,
        capacity: int,
        dtype: str,
        recipe: Recipe,
        anchor_offset: int = 0,
        compensation: LayerCompensation | None = None,
    ) -> LayerCache:
        """Allocate the cache of one layer.

        Parameters
        ----------
        anchor_offset : steps by which the layer's anchors come early (see `LayerCache`), 0 to recipe.anchor_every - 1.
        compensation : of a recipe with `rounding=gptq`, of these KV heads.

        Raises
        ------
        UsageError : if no kernel supports the combination, or it does not fit the device; before any allocation.
        ValueError : if the offset is out of range.
        """

    def follow(self, stream: int) -> None:
        """Enqueue all later work on the stream with this handle. No effect on a device without streams."""

    def cache_bytes(self, shape: AttentionShape, capacity: int, dtype: str, recipe: Recipe) -> int:
        """Return the device bytes that `cache` would allocate, scratch included."""

    def attention(self, caches: Sequence[LayerCache], queries: Sequence[Float32], steps: int, graph: bool) -> Program:
        """Return a program of `steps` decodes over `caches` in turn, each with its (batch, query_heads, head_dim) queries."""

    def cycle(self, caches: Sequence[LayerCache], first: Float32, feedback: Feedback, graph: bool) -> Program:
        """Return a program whose launch is one token through all `caches` as layers.

        Each layer maps the previous output through `feedback`, appends the key and value and decodes. The previous output
        is that of the layer below; for the first layer, that of the last layer one token ago, which is `first`,
        (batch, query_heads, head_dim), at the first token.
        """

    def ceilings(self) -> Ceilings:
        """Measure the device's limits (about a second)."""
