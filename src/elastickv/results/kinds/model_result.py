"""Results of whole models in Transformers: `elastickv run`, `bench --model` and `baseline transformers`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from elastickv.benchmark.from_dict import POSITIVE, SIGNED, Count, Duration, Positive, from_dict, optional
from elastickv.benchmark.stats.intervals import Interval
from elastickv.errors import UsageError

MODEL_BENCH_KIND = "elastickv-model-bench"
MODEL_BENCH_VERSION = 1
RUN_KIND = "elastickv-run"
RUN_VERSION = 1
ELASTIC = "elastic"
_ELASTIC, _BENCH, _OPTIONAL = optional("recipes"), optional("step_s"), optional()

M = TypeVar("M", bound="ModelBenchResult")


@dataclass(frozen=True)
class QualityDelta:
    """Predictions with a cache against those with the reference cache, token by token of a text.

    Attributes
    ----------
    reference : the reference cache.
    text : the text's name.
    context, tokens : tokens before the first prediction, and predictions.
    perplexity, reference_perplexity : with this cache and with the reference.
    kl_mean, kl_p95, kl_max : KL(reference || this) of a prediction over the whole vocabulary, nats.
    top1_percent : predictions whose likeliest token is the same.
    """

    reference: str
    text: str
    context: Count
    tokens: Count
    perplexity: float
    reference_perplexity: float
    kl_mean: float
    kl_p95: float
    kl_max: float
    top1_percent: float


@dataclass(frozen=True)
class PromptTokens:
    """The tokens of a benchmark's prompts.

    Attributes
    ----------
    prefix : the special tokens that the tokenizer puts before a text, such as a beginning-of-sequence token; [] for none.
    hash : 12 hex digits, equal for equal prompts: every cache read the same, and so did results with the same digits.
    """

    prefix: list[int]
    hash: str


@dataclass(frozen=True)
class CacheRecord:
    """What generated text took with one cache.

    Bytes of stock layers are those that they hold, read whole once a step; those of elastic layers are counted by recipe.
    The fields from `read_ratio` on are of an elastic cache alone, those from `step_ms` on of a benchmark. Ratios are of the
    layers with full attention. `kv_other_bytes` are those of other layers, as they are, `kv_other_dense_bytes` in 16 bit; the
    ratios of a `model` are of all layers, None if all have full attention.
    """

    cache: str
    rows: Count
    prompt_tokens: int
    new_tokens: int
    first_token_s: Positive | None
    tokens_per_s: Positive | None
    kv_read_bytes: float
    kv_stored_bytes: float
    kv_dense_bytes: float
    kv_allocated_bytes: float
    held_bytes: float | None
    peak_bytes: float | None
    peak_source: str | None
    read_ratio: Positive | None = field(default=None, metadata=_ELASTIC)
    stored_ratio: Positive | None = field(default=None, metadata=_ELASTIC)
    storing_s: float | None = field(default=None, metadata=_ELASTIC)
    storing_share_of_first_token: float | None = field(default=None, metadata=_ELASTIC)
    holds_from: int | None = field(default=None, metadata=_ELASTIC)
    captured_share: float | None = field(default=None, metadata=_ELASTIC)
    not_captured: str | None = field(default=None, metadata=_ELASTIC)
    ahead_share: float | None = field(default=None, metadata=_ELASTIC)
    calibrated: bool | None = field(default=None, metadata=_ELASTIC)
    recipe_hash: str | None = field(default=None, metadata=_ELASTIC)
    recipes: dict[str, str] | None = field(default=None, metadata=_OPTIONAL)
    step_ms: Annotated[Interval | None, POSITIVE] = field(default=None, metadata=_BENCH)
    median_step_ms: Positive | None = field(default=None, metadata=_BENCH)
    kv_read_bytes_per_step: float | None = field(default=None, metadata=_BENCH)
    floor_ms: Positive | None = field(default=None, metadata=_BENCH)
    of_floor: Positive | None = field(default=None, metadata=_BENCH)
    held_ratio: Positive | None = field(default=None, metadata=_BENCH)
    step_s: list[list[Duration]] | None = field(default=None, metadata=_OPTIONAL)
    kv_other_bytes: float | None = field(default=None, metadata=_OPTIONAL)
    kv_other_dense_bytes: float | None = field(default=None, metadata=_OPTIONAL)
    model_stored_ratio: Positive | None = field(default=None, metadata=_OPTIONAL)
    model_held_ratio: Positive | None = field(default=None, metadata=_OPTIONAL)


@dataclass(frozen=True)
class ModelDescription:
    """The model, and the bytes of the weights that a step reads."""

    name: str
    type: str
    dtype: str
    device: str
    device_name: str | None
    weights_bytes: float
    read_weights_bytes: float
    elastic_layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    random_weights: bool | None = field(default=None, metadata=_OPTIONAL)


@dataclass(frozen=True)
class CompressionStart:
    """From which contexts, in tokens, the elastic layers compress.

    Attributes
    ----------
    reads_less_from : where decodes begin to read less than a dense 16-bit cache. None: they never do.
    ratio_from : where they begin to read at most 1/C. None: nowhere, or there is no C.
    """

    reads_less_from: Count | None
    ratio_from: Count | None


@dataclass(frozen=True)
class RunResult:
    """What `elastickv run` writes with `--output`."""

    kind: str
    version: int
    environment: dict[str, Any]
    command: list[str]
    model: ModelDescription
    compress: Positive | None
    recipe: str | None
    temperature: float
    seed: Annotated[int, SIGNED]
    caches: list[CacheRecord]
    pairing: str | None
    speedup: Annotated[Interval | None, POSITIVE]
    noise_floor: Annotated[Interval | None, POSITIVE]
    same_text: bool | None
    text: str
    compression: CompressionStart | None = field(default=None, metadata=_OPTIONAL)

    @classmethod
    def from_dict(cls, value: Any, source: str = "the result") -> "RunResult":
        """Return these JSON values as a result.

        Raises
        ------
        UsageError : naming the key that is missing, of another type or out of range, or another version.
        """
        check_version(value, RUN_VERSION, source)
        return from_dict(cls, value, source)

    @property
    def device(self) -> str:
        """What it ran on."""
        return device_name(self.model, self.environment)


@dataclass(frozen=True)
class ModelBenchResult:
    """A result of `bench --model`: a model's decode with stock caches and the elastic one, taking turns."""

    kind: str
    version: int
    environment: dict[str, Any]
    machine: dict[str, Any]
    command: list[str]
    model: ModelDescription
    compress: Positive | None
    recipe: str | None
    calibrated: bool
    context: Count
    batch: Count
    rounds: int
    tokens: Count
    seed: Annotated[int, SIGNED]
    temperature: float
    pairing: str
    caches: list[CacheRecord]
    speedups: dict[str, Annotated[Interval | None, POSITIVE]]
    baseline: str | None
    noise_floor_of: str
    noise_floor: Annotated[Interval | None, POSITIVE]
    faster: bool | None
    not_run: dict[str, str]
    host: dict[str, Any] | None
    prompt: PromptTokens | None = field(default=None, metadata=_OPTIONAL, kw_only=True)

    @classmethod
    def from_dict(cls: type[M], value: Any, source: str = "the result") -> M:
        """Return these JSON values as a result.

        Raises
        ------
        UsageError : naming the key that is missing, of another type or out of range, or another version.
        """
        check_version(value, MODEL_BENCH_VERSION, source)
        return from_dict(cls, value, source)

    @property
    def device(self) -> str:
        """What it ran on."""
        return device_name(self.model, self.environment)

    @property
    def read_ceiling_gbs(self) -> float | None:
        """The device's measured read bandwidth, 10^9 bytes per second."""
        ceiling = self.machine.get("read_ceiling_gbs")
        return ceiling if type(ceiling) in (int, float) else None

    @property
    def host_flags(self) -> list[str]:
        """What disturbed the host during the measurement."""
        flags = (self.host or {}).get("flags")
        return [str(flag) for flag in flags] if isinstance(flags, list) else []


@dataclass(frozen=True)
class TransformersBaseline(ModelBenchResult):
    """A result of `elastickv baseline transformers`: `bench --model` with the quality cost of its recipe."""

    fidelity: QualityDelta | None
    fidelity_not_measured: str | None


def device_name(model: ModelDescription, environment: Mapping[str, Any]) -> str:
    """Return the name of the GPU, or of the processor."""
    return str(model.device_name or environment.get("cpu") or model.device)


def versions(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return the versions of packages that a result's environment records; empty where an older file has none."""
    recorded = environment.get("versions")
    return {str(name): version for name, version in recorded.items()} if isinstance(recorded, dict) else {}


def check_version(value: Any, version: int, source: str) -> None:
    """Refuse a result of another version.

    Raises
    ------
    UsageError : naming the versions.
    """
    written = value.get("version") if isinstance(value, dict) else None
    if written is not None and written != version:
        raise UsageError(
            f"{source} is of version {' '.join(str(written)[:40].split())}, and this program reads {version}: "
            "update elastickv, or measure again"
        )
