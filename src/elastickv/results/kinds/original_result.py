"""What the original program prints."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from elastickv.benchmark.from_dict import Bounds, Count, Positive, from_dict, optional

_OPTIONAL = optional()


@dataclass(frozen=True)
class OriginalBuild:
    """How its step was timed; samples are cut at both ends by `truncate_percent`."""

    cuda_graphs: bool
    inner_loops: int
    truncate_percent: Annotated[float, Bounds(0, 100)]


@dataclass(frozen=True)
class OriginalGpu:
    """The device."""

    name: str


@dataclass(frozen=True)
class OriginalConfiguration:
    """The workload: one row, as many KV heads as query heads."""

    seq_len: Count
    heads: Count
    head_dim: Count
    compression: Positive
    reps: Count
    warmup: int


@dataclass(frozen=True)
class OriginalFigures:
    """Its figures, milliseconds: a mean and a deviation, no samples."""

    attention_time_ms: Positive
    attention_time_std: float
    baseline_tokens_per_sec: float | None = field(default=None, metadata=_OPTIONAL)
    speedup_vs_baseline: Positive | None = field(default=None, metadata=_OPTIONAL)


@dataclass(frozen=True)
class OriginalCycle:
    """Its sequential decode, milliseconds."""

    decode_tokens: int
    elastic_total_ms: Positive
    speedup_vs_baseline: Positive | None = field(default=None, metadata=_OPTIONAL)
    speedup_low: float | None = field(default=None, metadata=_OPTIONAL)
    speedup_high: float | None = field(default=None, metadata=_OPTIONAL)


@dataclass(frozen=True)
class OriginalResult:
    """A result of the original program, as far as it is used here."""

    build: OriginalBuild
    gpu: OriginalGpu
    configuration: OriginalConfiguration
    results: OriginalFigures
    inference_cycle: OriginalCycle | None = None

    @classmethod
    def from_dict(cls, value: Any, source: str = "the result") -> "OriginalResult":
        """Return these JSON values as a result.

        Raises
        ------
        UsageError : naming the key that is missing, of another type or out of range.
        """
        return from_dict(cls, value, source)
