"""Results of `benchmarks/serving.py`: vLLM with each kind of KV cache."""

from dataclasses import dataclass, field
from typing import Any

from elastickv.benchmark.from_dict import Count, Duration, Positive, from_dict, optional
from elastickv.results.kinds.model_result import check_version

SERVING_KIND = "elastickv-serving"
SERVING_VERSION = 1


@dataclass(frozen=True)
class RatioOfRounds:
    """A figure divided by the baseline's: of the medians of all samples, and the least and the greatest of single rounds."""

    estimate: Positive
    low: Positive
    high: Positive


@dataclass(frozen=True)
class ServingFigure:
    """What was measured with requests of `context` tokens: the samples of each round, of which the figure is the median."""

    context: Count
    samples: list[list[Positive]]
    of_baseline: RatioOfRounds | None


@dataclass(frozen=True)
class ServingReads:
    """What decodes read, in all layers together, by the counters of ElasticKV's metrics in vLLM.

    `steps` are the engine's and `tokens` those of decodes, which every layer has in `layer_tokens`; at `anchors` of these a
    layer lists its pages anew.
    """

    read_bytes: Positive
    dense_bytes: Positive
    steps: Count
    tokens: Count
    layer_tokens: Count
    anchors: int

    @property
    def ratio(self) -> float:
        """Dense bytes / bytes read."""
        return self.dense_bytes / self.read_bytes

    @property
    def anchor_share(self) -> float:
        """The share of tokens at which a layer lists its pages anew."""
        return self.anchors / self.layer_tokens


@dataclass(frozen=True)
class ServingStep(ServingFigure):
    """A decode step of `batch` requests."""

    batch: Count
    ms: Duration
    reads: ServingReads | None = field(default=None, metadata=optional())


@dataclass(frozen=True)
class ServingFirstToken(ServingFigure):
    """Seconds from a prompt to its first token."""

    s: Duration


@dataclass(frozen=True)
class ServingCapacity:
    """The requests of `context` tokens that vLLM counts on at once, and their tokens."""

    context: Count
    requests: Positive
    tokens: Positive


@dataclass(frozen=True)
class ServingThroughput(ServingFigure):
    """Decoding with as many requests as fit."""

    requests: Count
    step_ms: Duration
    tokens_per_s: Positive


@dataclass(frozen=True)
class ServingContender:
    """One kind of KV cache; figures that were not measured are null or missing from their list.

    `backends` are vLLM's attention backend classes, `flash_attention` their version of FlashAttention where they use it.
    `startup_s` are seconds until the engine of each process could serve; `graph_bytes` is what vLLM logs of its CUDA graphs,
    `peak_bytes` the most that PyTorch held.
    """

    contender: str
    kv_cache_dtype: str | None
    backends: list[str]
    flash_attention: int | None
    steps: list[ServingStep]
    capacity: list[ServingCapacity]
    throughput: ServingThroughput | None
    first_token: ServingFirstToken | None
    startup_s: list[Duration]
    graph_bytes: float | None
    peak_bytes: float | None
    failures: list[str]


@dataclass(frozen=True)
class ServingDevice:
    """What the engines ran on; null where none started."""

    device: str | None
    driver: str | None
    vllm: str | None
    torch: str | None


@dataclass(frozen=True)
class ServingSettings:
    """How it was measured: with `prefill`, prompts were computed, else their cache was filled.

    `device` is 'cuda' or 'cpu', `engine` holds further arguments of `vllm.LLM`, `time_limit` is in seconds.
    """

    rounds: Count
    samples: Count
    prefill: bool
    device: str
    engine: dict[str, Any]
    time_limit: Duration


@dataclass(frozen=True)
class ServingResult:
    """vLLM's speed, capacity and start-up with each kind of KV cache, each in processes of its own that took turns.

    `processes` are the records of the processes in their order, as `benchmarks/serving_engine.py` wrote them.
    """

    kind: str
    version: int
    environment: dict[str, Any]
    command: list[str]
    device: ServingDevice
    model: str
    weights: str
    settings: ServingSettings
    baseline: str
    contenders: list[ServingContender]
    dropped: list[str]
    processes: list[dict[str, Any]]

    @classmethod
    def from_dict(cls, value: Any, source: str = "the result") -> "ServingResult":
        """Return these JSON values as a result.

        Raises
        ------
        UsageError : naming the key that is missing, of another type or out of range, or another version.
        """
        check_version(value, SERVING_VERSION, source)
        return from_dict(cls, value, source)
