"""What the page shows of results: one value a result, whichever program wrote it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from elastickv.benchmark.result import RecipeUsed, Result, Timing
from elastickv.benchmark.roofline import RooflinePoint
from elastickv.evaluation.metrics import Estimate
from elastickv.results.compare.result_sets import cells_by_name
from elastickv.results.compare.runs import OutputErrors
from elastickv.results.documents import Document
from elastickv.results.kinds.evaluation_result import GenerationRow, TaskRow
from elastickv.results.kinds.gguf_result import OurFormat
from elastickv.results.kinds.model_result import QualityDelta
from elastickv.results.kinds.original_result import OriginalResult
from elastickv.results.kinds.serving_result import ServingResult
from elastickv.results.kinds.soak_result import SoakResult
from elastickv.results.kinds.sweep_record import UnmeasuredCell

BENCH, RUN = "bench", "run"  # programs: of a model that decodes in turns, of a text that was generated once


@dataclass(frozen=True)
class IntervalEstimate:
    """A figure and its 95 % interval; the bounds are None where the file has none."""

    estimate: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def over(cls, figure: Estimate, rows: int, scale: float = 1.0) -> "IntervalEstimate":
        """Return a mean over windows or items, times `scale`; of a single one the bounds in a file are the mean itself."""
        if rows == 1:
            return cls(scale * figure.mean)
        return cls(scale * figure.mean, scale * figure.low, scale * figure.high)


@dataclass(frozen=True)
class ContenderTime:
    """One contender's decode step: its timing, and the interval of its mean in milliseconds."""

    timing: Timing
    time_ms: IntervalEstimate


@dataclass(frozen=True)
class Provenance:
    """What a result says of how it came about.

    Attributes
    ----------
    source : its file, and the line of it.
    device : what it ran on.
    date : when, UTC.
    command : the command line; empty where the file has none.
    environment : name -> value, as text.
    warnings : every warning, telemetry flag and contender that was not run, a line each.
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
    provenance : how it came about.
    result : all of it.
    context, batch, heads, kv_heads, head_dim, cache : the workload; cache is 'cold' or 'hot'.
    method : how it was measured: steps that differ in it are never averaged.
    compress, requested : the requested C, and the recipe or 'auto'.
    recipe : what was run; None of the original program.
    read, stored : dense bytes / bytes read, and stored.
    elastic_ms, dense_ms, baseline : times of a step, and the dense contender's name; None where the file has none.
    speedup : dense time / elastic time.
    faster : beyond the noise floor; None where that was not measured.
    error, error_recipe : the recipe error, relative L2, and the recipe that it was measured of.
    cycle : dense time / elastic time of whole decoded tokens.
    contenders : every one that was timed; empty of the original program.
    memory : the bytes of its recipe.
    samples_ms : milliseconds a step, contender -> series; 'token' series are of a token through all layers.
    """

    provenance: Provenance
    result: Result | OriginalResult
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
    error: OutputErrors | None
    error_recipe: str | None
    cycle: IntervalEstimate | None
    contenders: Sequence[ContenderTime]
    roofline: Mapping[str, RooflinePoint]
    read_gbs: float | None
    flops_gflops: float | None
    memory: RecipeUsed | None
    samples_ms: Mapping[str, Sequence[float]]
    token_ms: Mapping[str, Sequence[float]]
    method: Mapping[str, Any]
    flagged: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def shape(self) -> str:
        """The workload without its context."""
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"batch {self.batch}, {heads} heads × {self.head_dim}{'' if self.cache == 'cold' else f', {self.cache} cache'}"

    @property
    def read_bytes(self) -> Mapping[str, float]:
        """Bytes of the cache that one step reads, by part; query and output do not count into C."""
        parts = self.memory.bytes_per_step if self.memory else {}
        return {part: count for part, count in parts.items() if part not in ("query", "output")}

    @property
    def requested_label(self) -> str:
        """The request: a recipe by name, or C."""
        return f"{self.requested} C={self.compress:g}" if self.requested in ("auto", "original") else self.requested

    @property
    def what(self) -> str:
        """The recipe as it is called in tables and legends."""
        return self.recipe or "the original program"


@dataclass(frozen=True)
class ModelCache:
    """A model's decode with one cache; figures that were not measured are None."""

    name: str
    step_ms: IntervalEstimate | None
    tokens_per_s: float | None
    quality: QualityDelta | None
    token_ms: Sequence[float]
    of_floor: float | None = None
    read_ratio: float | None = None
    stored_ratio: float | None = None
    held_ratio: float | None = None
    model_stored_ratio: float | None = None
    model_held_ratio: float | None = None
    read_bytes: float | None = None
    stored_bytes: float | None = None
    held_bytes: float | None = None
    peak_bytes: float | None = None
    first_token_s: float | None = None
    bytes_per_token: float | None = None
    new_tokens: int | None = None


@dataclass(frozen=True)
class Ratio:
    """Time with the cache `slow` / time with the cache `fast`, measured in turns."""

    fast: str
    slow: str
    times: IntervalEstimate


@dataclass(frozen=True)
class ModelRun:
    """A whole model, decoding with several caches.

    Attributes
    ----------
    requested : C or the recipe of the elastic cache; empty for another program's caches.
    ratios : of the caches' times, those against the baseline first.
    formats : our formats' bytes for the same layers.
    not_run : caches that were not measured, and why.
    program : the command that measured it.
    text : of `elastickv run`, whether the stock cache's text is the same; empty where it did not run.
    """

    provenance: Provenance
    model: str
    dtype: str
    context: int | None
    batch: int | None
    requested: str
    caches: Sequence[ModelCache]
    ratios: Sequence[Ratio]
    formats: Sequence[OurFormat]
    not_run: Mapping[str, str]
    program: str
    text: str = ""

    @property
    def best(self) -> Ratio | None:
        """The largest ratio against the baseline, by its lower bound."""
        candidates = [ratio for ratio in self.ratios if ratio.slow == self.ratios[0].slow]
        return max(candidates, key=lambda ratio: ratio.times.low or 0.0, default=None)


@dataclass(frozen=True)
class Loss:
    """What one cache costs a model's predictions at one context; ratios are None of a cache that is not ours.

    `bits` of a quantized element and `stored_bits` of any element are those of a KV format that was named, and `exact_dtype` is
    what its numbers were rounded to first. `read_bytes` are those of one sequence in a step; `selection` is the method of a
    published selection.
    """

    context: int
    cache: str
    recipe: str
    read: float | None
    stored: float | None
    ppl_percent: IntervalEstimate
    kl: IntervalEstimate
    top1_percent: IntervalEstimate
    greedy: str
    bits: float | None = None
    stored_bits: float | None = None
    read_bytes: float | None = None
    selection: str | None = None
    exact_dtype: str | None = None


@dataclass(frozen=True)
class Needle:
    """Pass keys in prompts of one length with one cache: depth -> (right, tried)."""

    tokens: int
    cache: str
    answers: Mapping[float, tuple[int, int]]

    @property
    def hits(self) -> int:
        """How many were answered, at all depths."""
        return sum(hits for hits, _ in self.answers.values())

    @property
    def tried(self) -> int:
        """How many there were."""
        return sum(count for _, count in self.answers.values())


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
    generations: Sequence[GenerationRow] = ()
    tasks: Sequence[TaskRow] = ()
    exact_tokens: str = ""

    @property
    def caches(self) -> list[Loss]:
        """Losses of caches at a C and of stock caches; KV formats and selections are compared by bytes."""
        return [loss for loss in self.losses if loss.stored_bits is None and loss.selection is None]

    @property
    def method(self) -> str:
        """On what it was evaluated."""
        exact = f", exact tokens {self.exact_tokens}" if self.exact_tokens else ""
        return f"{self.dtype}, {', '.join(self.texts)}{exact}"


@dataclass(frozen=True)
class Serving:
    """A result of `benchmarks/serving.py`."""

    provenance: Provenance
    result: ServingResult


@dataclass(frozen=True)
class Soak:
    """A result of `benchmarks/serving_soak.py`."""

    provenance: Provenance
    result: SoakResult


@dataclass(frozen=True)
class ReportData:
    """All results of a report.

    Attributes
    ----------
    steps, models, evaluations, servings, soaks : results by kind, in the order of the inputs.
    sweeps : what each sweep was to measure: its source and command.
    unmeasured : cells of sweeps that have no result, and why; those that the file lacks are among them.
    incomplete : a sentence for each sweep that lacks cells of its plan.
    unreadable : why a file was left out, a line each: it cannot be read, or is no result.
    notes : what else was left out of the inputs, a line each.
    documents : the results themselves.
    inputs : every file that was read, whether or not something of it is shown.
    """

    steps: Sequence[Step]
    models: Sequence[ModelRun]
    evaluations: Sequence[Evaluation]
    sweeps: Sequence[tuple[str, Sequence[str]]]
    unmeasured: Sequence[UnmeasuredCell]
    incomplete: Sequence[str]
    unreadable: Sequence[str]
    notes: Sequence[str]
    documents: Sequence[Document]
    inputs: Sequence[str] = ()
    servings: Sequence[Serving] = ()
    soaks: Sequence[Soak] = ()

    @property
    def not_measured(self) -> Mapping[str, str]:
        """Cells of sweeps that have no result, and why."""
        return cells_by_name(self.unmeasured)

    @property
    def provenance(self) -> list[Provenance]:
        """How each result came about."""
        results: list[Any] = [*self.steps, *self.models, *self.evaluations, *self.servings, *self.soaks]
        return [result.provenance for result in results]

    @cached_property
    def names(self) -> Mapping[str, str]:
        """The name of each source: its path without the folders common to all."""
        sources = [provenance.source for provenance in self.provenance]
        folders = [source.rpartition("/")[0] for source in sources]
        common = os.path.commonpath(folders) if all(folders) and len({f[:1] == "/" for f in folders}) == 1 else ""
        return {source: source[len(common) :].lstrip("/") for source in sources}
