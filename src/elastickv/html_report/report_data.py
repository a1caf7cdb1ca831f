"""What the page takes of results: one value a result, whichever program wrote it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from elastickv.results.documents import Document


@dataclass(frozen=True)
class IntervalEstimate:
    """A figure and its 95 % interval; the bounds are None where a file tells none."""

    estimate: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ContenderTimes:
    """One contender's decode step: milliseconds with the interval of their mean."""

    name: str
    kind: str
    dtype: str
    time_ms: IntervalEstimate


@dataclass(frozen=True)
class RecipeError:
    """The recipe error of a result, relative L2: `recipe` is the one that it was measured of, `where` on what."""

    recipe: str
    where: str
    mean: float
    p95: float
    max: float


@dataclass(frozen=True)
class PlottedPoint:
    """Where a step stands: floating-point operations per byte, 10^9 of them per second, and the share of what is attainable."""

    intensity: float
    gflops: float
    score: float
    bandwidth_gbs: float


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of a recipe: what one step reads by part, the largest step, what is stored, and what dense reads."""

    dense: float
    read: Mapping[str, float]
    largest_step: float
    stored: float


@dataclass(frozen=True)
class Provenance:
    """What a result says of how it came about.

    Attributes
    ----------
    source : its file, and the line of it.
    device : what it ran on.
    date : when, UTC.
    command : what was typed; empty where the file does not tell.
    environment : name -> value, as text.
    warnings : every caution, telemetry flag and contender that was not run, a line each.
    """

    source: str
    device: str
    date: str
    command: Sequence[str]
    environment: Mapping[str, str]
    warnings: Sequence[str]


@dataclass(frozen=True)
class Step:
    """A decode step of one layer: a result of `bench`, or of the original program.

    Attributes
    ----------
    told : how it came about.
    context, batch, heads, kv_heads, head_dim, cache : the workload; cache is 'cold' or 'hot'.
    compress, requested : what was asked for.
    recipe : what was run; None of the original program.
    read, stored : dense bytes / bytes read, and stored.
    elastic_ms, dense_ms, baseline : times of a step, and which contender dense was; None where the file tells none.
    speedup : dense time / elastic time.
    faster : beyond the noise floor; None where that was not measured.
    cycle : dense time / elastic time of whole decoded tokens.
    contenders : every one that was timed; empty of the original program.
    samples_ms : milliseconds a step, contender -> series; 'token' series are of a token through all layers.
    """

    provenance: Provenance
    context: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    cache: str
    compress: float
    requested: str
    recipe: str | None
    read: float | None
    stored: float | None
    elastic_ms: float
    dense_ms: float | None
    baseline: str | None
    speedup: IntervalEstimate | None
    noise_floor: IntervalEstimate | None
    faster: bool | None
    error: RecipeError | None
    cycle: IntervalEstimate | None
    contenders: Sequence[ContenderTimes]
    roofline: Mapping[str, PlottedPoint]
    read_gbs: float | None
    flops_gflops: float | None
    memory: MemoryUse | None
    samples_ms: Mapping[str, Sequence[float]]
    token_ms: Mapping[str, Sequence[float]]
    flagged: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def shape(self) -> str:
        """The workload without its context."""
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"batch {self.batch}, {heads} heads × {self.head_dim}{'' if self.cache == 'cold' else f', {self.cache} cache'}"

    @property
    def requested_label(self) -> str:
        """What was asked for: a recipe by name, or C."""
        return f"{self.requested} C={self.compress:g}" if self.requested in ("auto", "original") else self.requested

    @property
    def what(self) -> str:
        """The recipe as it is called in tables and legends."""
        return self.recipe or "the original program"


@dataclass(frozen=True)
class ModelCache:
    """A model's decode with one cache; figures that a file does not tell are None."""

    name: str
    step_ms: IntervalEstimate | None
    tokens_per_s: float | None
    of_floor: float | None
    read_ratio: float | None
    stored_ratio: float | None
    held_ratio: float | None
    read_bytes: float | None
    stored_bytes: float | None
    held_bytes: float | None
    peak_bytes: float | None
    first_token_s: float | None
    bytes_per_token: float | None
    price: "ReportedQualityDelta | None"
    token_ms: Sequence[float]


@dataclass(frozen=True)
class ReportedQualityDelta:
    """What a cache does to a model's predictions, against those with another: `on` says with which, and of which text."""

    on: str
    perplexity: float
    kl: float
    top1_percent: float


@dataclass(frozen=True)
class Ratio:
    """Time with the cache `slow` / time with the cache `fast`, measured in turns."""

    fast: str
    slow: str
    times: IntervalEstimate


@dataclass(frozen=True)
class StoredFormat:
    """One of our formats for a model that another program ran: bytes of a token in all layers, dense bytes / stored."""

    recipe: str
    bytes_per_token: float
    stored: float


@dataclass(frozen=True)
class ModelRun:
    """A whole model, decoding with several caches.

    Attributes
    ----------
    asked : what the elastic cache was given: C or a recipe.
    ratios : of the caches' times, those against the baseline first.
    formats : our formats' bytes for the same layers.
    not_run : caches that were not measured, and why.
    """

    provenance: Provenance
    model: str
    dtype: str
    context: int | None
    batch: int | None
    requested: str
    caches: Sequence[ModelCache]
    ratios: Sequence[Ratio]
    formats: Sequence[StoredFormat]
    not_run: Mapping[str, str]

    @property
    def best(self) -> Ratio | None:
        """The largest ratio against the baseline, by its lower bound."""
        provenance = [ratio for ratio in self.ratios if ratio.slow == self.ratios[0].slow]
        return max(provenance, key=lambda ratio: ratio.times.low or 0.0, default=None)


@dataclass(frozen=True)
class Loss:
    """What one cache costs a model's predictions at one context; ratios are None of a cache that is not ours."""

    context: int
    cache: str
    recipe: str
    read: float | None
    stored: float | None
    ppl_percent: IntervalEstimate
    kl: IntervalEstimate
    top1_percent: IntervalEstimate
    greedy: str


@dataclass(frozen=True)
class Needle:
    """Pass keys in prompts of one length with one cache: depth -> (found, tried)."""

    tokens: int
    cache: str
    found: Mapping[float, tuple[int, int]]

    @property
    def hits(self) -> int:
        """How many were found, at all depths."""
        return sum(there for there, _ in self.found.values())

    @property
    def tried(self) -> int:
        """How many there were."""
        return sum(count for _, count in self.found.values())


@dataclass(frozen=True)
class Evaluation:
    """A result of `eval`."""

    provenance: Provenance
    model: str
    dtype: str
    texts: Sequence[str]
    calibration: str
    losses: Sequence[Loss]
    needles: Sequence[Needle]
    suggestion: str


@dataclass(frozen=True)
class ReportData:
    """Everything that was given.

    Attributes
    ----------
    steps, models, evaluations : results by kind, as given.
    sweeps : what each sweep was to measure: its source and command.
    not_measured : cells of sweeps that have no result, and why.
    notes : what was left out of what was given, a line each.
    documents : the results themselves.
    """

    steps: Sequence[Step]
    models: Sequence[ModelRun]
    evaluations: Sequence[Evaluation]
    sweeps: Sequence[tuple[str, Sequence[str]]]
    not_measured: Mapping[str, str]
    notes: Sequence[str]
    documents: Sequence[Document]

    @property
    def provenance(self) -> list[Provenance]:
        """How each result came about."""
        results: list[Any] = [*self.steps, *self.models, *self.evaluations]
        return [result.provenance for result in results]

    @cached_property
    def names(self) -> Mapping[str, str]:
        """What to call each source: its path without the folders that all of them are in."""
        sources = [provenance.source for provenance in self.provenance]
        folders = [source.rpartition("/")[0] for source in sources]
        common = os.path.commonpath(folders) if all(folders) and len({f[:1] == "/" for f in folders}) == 1 else ""
        return {source: source[len(common) :].lstrip("/") for source in sources}
