"""The result of a run: one value that every exporter reads. Its JSON is described by `result.schema.json`."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from elastickv.benchmark.accuracy import SampleAccuracy
from elastickv.benchmark.from_dict import POSITIVE, SIGNED, Count, Duration, Keys, Positive, from_dict, to_dict
from elastickv.benchmark.gate import Verdict
from elastickv.benchmark.roofline import RooflinePoint
from elastickv.benchmark.stats.intervals import Interval
from elastickv.errors import UsageError
from elastickv.kvcache.error_metrics import ErrorSummary

SCHEMA_VERSION = "1.0"


@dataclass(frozen=True)
class Build:
    """How the timed programs were made: graphs as actually used, steps to a sample, samples cut."""

    cuda_graphs: bool
    inner_loops: int
    truncate_percent: float
    inner_loops_requested: int
    graph_nodes: int | None
    kernels_per_step: int | None


@dataclass(frozen=True)
class Gpu:
    """The device; on a CPU it names the processor."""

    name: str
    sm: str | None
    theoretical_bw_gbs: float | None
    kind: str
    compute_units: int
    last_level_cache_bytes: int
    memory_bytes: int
    driver: str | None


@dataclass(frozen=True)
class Configuration:
    """The requested options; `dense` is the requested dense dtype, null for the fastest contender."""

    seq_len: Count
    heads: Count
    head_dim: Count
    compression: Annotated[int | float, POSITIVE]
    reps: int
    warmup: int
    batch: Count
    kv_heads: Count
    dtype: str
    seed: Annotated[int, SIGNED]
    paired_baseline: bool
    cache: str
    time_limit_s: float | None
    until_ci_percent: float | None
    command: list[str]
    dense: str | None = None


@dataclass(frozen=True)
class Results:
    """The original micro-benchmark's figures, of the elastic step; times are per decode step of one layer."""

    attention_time_ms: float
    attention_time_std: float
    coefficient_of_variation: float
    tokens_per_sec: float
    baseline_tokens_per_sec: float
    speedup_vs_baseline: float
    memory_bandwidth_gbs: float
    memory_efficiency_percent: float
    roofline_score: float
    memory_efficiency_reference: str


@dataclass(frozen=True)
class InferenceCycle:
    """Sequential decode, milliseconds. Totals are geometric means over rounds, for one layer: raw total / layers.

    Latencies are of one token through all layers; `raw_token_latencies_ms` holds them per contender, round and token.
    `anchor_phases` are the steps by which each layer's anchors come early: layers of different phases have them at different
    tokens. Where it is null, all layers had them at the same ones, the first token's among them.
    """

    decode_tokens: int
    baseline_total_ms: Positive
    elastic_total_ms: Positive
    baseline_tokens_per_sec: float
    elastic_tokens_per_sec: float
    speedup_vs_baseline: Positive
    speedup_low: float | None
    speedup_high: float | None
    layers: Count
    raw_token_latencies_ms: Annotated[dict[str, list[list[Duration]]], Keys(("dense", "elastic"))]
    rounds: int
    baseline_name: str
    raw_baseline_total_ms: float
    raw_elastic_total_ms: float
    baseline_token_latency_ms: dict[str, float]
    elastic_token_latency_ms: Annotated[dict[str, float], Keys(("p50", "p99")), POSITIVE]
    cuda_graphs: bool
    graph_nodes: int | None
    kernel_nodes_per_layer_step: float | None = None
    anchor_phases: list[int] | None = None


@dataclass(frozen=True)
class RecipeUsed:
    """The recipe, and the bytes of one step averaged over an anchor interval.

    `predicted_loss` is the recipe error (root mean square) that the solver expects; None where none was measured.
    `largest_ratio_scoring_every_step` is set for recipes that select pages. `fallback` says why dense attention was timed
    although `auto` chose a recipe; None where the recipe was timed.
    """

    text: str
    hash: str
    requested: str
    ratio_read: Positive
    ratio_stored: Positive
    dense_bytes_per_step: Positive
    bytes_per_step: dict[str, float]
    largest_step_bytes: float
    stored_bytes: int
    predicted_loss: float | None = None
    largest_ratio_scoring_every_step: float | None = None
    fallback: str | None = None


@dataclass(frozen=True)
class Timing:
    """One contender's step."""

    name: str
    kind: str
    version: str
    dtype: str
    time_ms: Positive
    time_std_ms: float
    coefficient_of_variation: float
    kv_bandwidth_gbs: float
    copies: int
    steps_per_sample: int
    touched_bytes: float
    cold: bool
    captured: bool
    graph_nodes: int | None


@dataclass(frozen=True)
class DenseComparison:
    """One dense contender against another, in turns, before the run: how many times as fast it is as the reference."""

    name: str
    reference: str
    speed: Annotated[Interval, POSITIVE]


@dataclass(frozen=True)
class Baseline:
    """The fastest dense contender, the reference of every ratio, and the times of the others.

    `reason` says why it is the baseline; `compared` are the comparisons that decided. Older files lack `dtype` and both.
    """

    name: str
    version: str
    time_ms: Positive
    memory_bandwidth_gbs: float
    memory_efficiency_percent: float
    candidates_ms: dict[str, float]
    not_run: dict[str, str]
    dtype: str | None = None
    reason: str | None = None
    compared: list[DenseComparison] | None = None


@dataclass(frozen=True)
class RecipeErrors:
    """The output errors of the kernels that were timed.

    `kernel_error` holds the timing data's per contender; `sample` is of the recipe that is timed. Where the sample is shorter
    than the timed context, or its heads don't take that recipe, `sample` is of one that is solved for the sample at the same
    ratio, and `sample_differs` says so; older files say nothing. Where none can be solved, `sample_refused` says why, and
    `sample` is of the timed recipe; None if that doesn't fit either.
    """

    source: str
    kernel_error: dict[str, ErrorSummary]
    sample: SampleAccuracy | None
    sample_refused: str | None
    sample_differs: str | None = None


@dataclass(frozen=True)
class Convergence:
    """Whether the interval got narrow enough, and what stopped the run."""

    converged: bool
    half_width_percent: float
    target_percent: float
    stopped_by: str
    rounds: int


@dataclass(frozen=True)
class Repetitions:
    """Samples of dense and elastic, and the discarded ones before: as requested, and as executed within the time limit."""

    requested: int
    executed: int
    warmup_requested: int
    warmup_executed: int


@dataclass(frozen=True)
class RunTime:
    """Wall-clock seconds of the whole run and of its phases, and what was left out to keep the time limit."""

    limit_s: float | None
    total_s: float
    phases_s: dict[str, float]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Result:
    """Everything about one run.

    `samples` are milliseconds per decode step, one series a contender; `flagged_samples` are the indices of those taken while
    telemetry saw a disturbance: they are kept, and marked.
    """

    benchmark_type: str
    brand: str
    build: Build
    gpu: Gpu
    configuration: Configuration
    results: Results
    inference_cycle: InferenceCycle | None
    schema_version: str
    date_utc: str
    complete: bool
    recipe: RecipeUsed
    baseline: Baseline
    contenders: list[Timing]
    speedup: Annotated[Interval, POSITIVE]
    pairing: str
    faster: bool
    noise_floor: Annotated[Interval | None, POSITIVE]
    ceilings: Annotated[dict[str, float], Keys(("read_gbs", "flops_gflops")), POSITIVE]
    roofline: Annotated[dict[str, RooflinePoint], Keys(("dense", "elastic")), POSITIVE]
    fidelity: RecipeErrors
    convergence: Convergence
    telemetry: dict[str, Any]
    environment: dict[str, Any]
    verdict: Verdict | None
    warnings: list[str]
    samples: Annotated[dict[str, list[Duration]], Keys(("elastic",))] = field(repr=False)
    sample_order: list[str] = field(repr=False)
    flagged_samples: dict[str, list[int]] = field(repr=False)
    repetitions: Repetitions | None = None
    run_time: RunTime | None = None

    @property
    def fallback(self) -> str | None:
        """Why dense attention was timed instead of the recipe that `auto` chose; None where the recipe was timed."""
        if self.recipe.fallback is not None:
            return self.recipe.fallback
        return next((text for text in self.warnings if text.startswith("auto fell back to dense")), None)  # older files

    @classmethod
    def from_dict(cls, value: Any, source: str = "the result") -> "Result":
        """Return the result that `as_dict` made these JSON values of.

        Fields that older files lack get their defaults; keys of later minor versions are ignored.

        Parameters
        ----------
        source : what error messages call the value: its file.

        Raises
        ------
        UsageError : naming the key that is missing, of another type or out of range, or another schema version.
        """
        version = value.get("schema_version") if isinstance(value, dict) else None
        if version is not None and str(version).partition(".")[0] != SCHEMA_VERSION.partition(".")[0]:
            todo = "measure again" if _parts(str(version)) < _parts(SCHEMA_VERSION) else "update elastickv, or measure again"
            written = " ".join(str(version)[:40].split())
            raise UsageError(f"{source} is of schema {written}, and this program reads {SCHEMA_VERSION}: {todo}")
        return from_dict(cls, value, source)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON values, keys in documented order."""
        plain: dict[str, Any] = to_dict(self)
        return plain


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else 0 for part in version.split("."))
