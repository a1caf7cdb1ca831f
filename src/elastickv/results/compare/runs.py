"""The form in which a comparison uses a result, whichever program wrote it."""

from dataclasses import dataclass, field, replace
from typing import Any

from elastickv.benchmark.stats.intervals import SummaryStats

# Keys of a protocol. Runs that differ in one of them are no repetitions of one measurement.
METHOD = (
    "program", "pairing", "CUDA graphs", "inner loops", "warm-up", "truncation", "tokens of a sample", "new tokens",
    "temperature",
)  # fmt: skip
Pairs = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Cell:
    """What was measured: a workload and the requested options. Both are (name, value) pairs, in order."""

    workload: Pairs
    requested: Pairs

    def __str__(self) -> str:
        return " ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in self.pairs)

    @property
    def pairs(self) -> Pairs:
        """All of them."""
        return self.workload + self.requested


@dataclass(frozen=True)
class Times:
    """One figure's times.

    Attributes
    ----------
    mean_ms : mean as the file reports it.
    elastic : the samples in milliseconds, or their mean and deviation; None where the file has no spread.
    dense : samples of dense contenders taken in turns with them, by name.
    truncate : percent of samples cut at either end.
    fidelity : the error of this figure's cache, where a run has several caches; otherwise the run's error counts.
    tokens_per_s : of a model's decode, all rows together.
    kv_bytes : of a model's KV cache: 'read' in one step, 'stored' at the end.
    """

    mean_ms: float
    elastic: tuple[float, ...] | SummaryStats | None
    dense: dict[str, tuple[float, ...]]
    truncate: float
    fidelity: "OutputErrors | None" = None
    tokens_per_s: float | None = None
    kv_bytes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputErrors:
    """The error that came with the times: what it was measured on, mean, p95 and max, and the kernel error's mean.

    Of a step it is the recipe error; of a model what its predictions lose (KL, nats), where the kernel has no error apart.
    """

    measured_on: str
    mean: float
    p95: float
    max: float
    kernel: float | None


@dataclass(frozen=True)
class BenchmarkRun:
    """One result.

    Attributes
    ----------
    source : its file, and the line of it.
    result : all of it, as one of `elastickv.results.kinds` or `elastickv.benchmark.Result`.
    device : what it ran on; `driver`, `versions`, `threads` and so on are in `protocol`.
    recipe, ratio_read : the recipe that was run, and dense bytes / bytes read; None where the program has none.
    protocol : how it was measured, name -> value.
    figures : 'step', and where it was measured 'cycle' with its tokens.
    fidelity : None where none was measured.
    complete : False for an interrupted run.
    """

    source: str
    cell: Cell
    device: str
    recipe: str | None
    ratio_read: float | None
    protocol: dict[str, Any]
    figures: dict[str, Times]
    fidelity: OutputErrors | None
    complete: bool
    result: Any = field(compare=False, repr=False)

    @property
    def method(self) -> dict[str, Any]:
        """The part of the protocol that runs must share to be averaged: of the method, not of the machine or of versions."""
        return {name: self.protocol[name] for name in METHOD if name in self.protocol}

    def copies(self, other: "BenchmarkRun") -> bool:
        """Whether both are one measurement, in whatever files."""
        return self.cell == other.cell and self == replace(other, source=self.source)
