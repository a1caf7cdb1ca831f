"""Results of `elastickv baseline gguf`: llama.cpp with each of its KV cache types."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from elastickv.benchmark.from_dict import POSITIVE, SIGNED, Count, Duration, Keys, Positive, from_dict, optional
from elastickv.benchmark.stats.intervals import Interval
from elastickv.results.kinds.model_result import PromptTokens, QualityDelta, check_version

GGUF_KIND = "elastickv-gguf-baseline"
GGUF_VERSION = 1


@dataclass(frozen=True)
class GgufShape:
    """The model of a .gguf file; `file_bytes` are its weights and a little more."""

    name: str
    architecture: str
    file_bytes: int
    layers: int
    query_heads: int
    kv_heads: list[int]
    key_dim: int
    value_dim: int
    positions: int
    vocabulary: int


@dataclass(frozen=True)
class KvCache:
    """One KV cache type of llama.cpp.

    Speeds are those of the mean sample; `prompt_ms` and `step_ms` are means of a token with their intervals, and
    `prompt_s` and `decode_s` the samples: seconds of the whole prompt, and of all decodes after it. Fewer than three samples
    make no interval: null. Bytes are of one token in all layers; null where `bytes_not_counted` says why.
    """

    cache: str
    prompt_tokens_per_s: Positive
    prompt_ms: Annotated[Interval | None, POSITIVE]
    tokens_per_s: Positive
    step_ms: Annotated[Interval | None, POSITIVE]
    kv_bytes_per_token: Positive | None
    stored_ratio: Positive | None
    fidelity: QualityDelta | None
    prompt_s: list[Duration]
    decode_s: list[Duration]


@dataclass(frozen=True)
class OurFormat:
    """One of our formats for the same layers: bytes of one token in all of them.

    `kv_bytes_per_token` and the ratios are of the whole cache at the context, sinks and window counted;
    `kv_bytes_per_cold_token` is what each token adds that has left the window.
    """

    recipe: str
    recipe_hash: str
    kv_bytes_per_token: Positive
    kv_bytes_per_cold_token: float
    stored_ratio: Positive
    read_ratio: Positive


@dataclass(frozen=True)
class GgufBaseline:
    """llama.cpp's speed and predictions with each of its KV cache types, taking turns, and our formats' bytes beside theirs."""

    kind: str
    version: int
    environment: dict[str, Any]
    command: list[str]
    engine: Annotated[dict[str, str], Keys(("name", "version", "device"))]
    threads: int
    model: GgufShape
    context: Count
    tokens: Count
    rounds: int
    seed: Annotated[int, SIGNED]
    pairing: str
    caches: list[KvCache]
    speedups: dict[str, Annotated[Interval | None, POSITIVE]]
    baseline: str
    noise_floor: Annotated[Interval | None, POSITIVE]
    formats: list[OurFormat]
    formats_not_counted: str | None
    bytes_not_counted: str | None
    fidelity_not_measured: str | None
    seconds: float
    prompt: PromptTokens | None = field(default=None, metadata=optional())

    @classmethod
    def from_dict(cls, value: Any, source: str = "the result") -> "GgufBaseline":
        """Return these JSON values as a result.

        Raises
        ------
        UsageError : naming the key that is missing, of another type or out of range, or another version.
        """
        check_version(value, GGUF_VERSION, source)
        return from_dict(cls, value, source)
