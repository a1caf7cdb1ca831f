"""Results of `elastickv eval`: what caches cost a model's predictions."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from elastickv.benchmark.from_dict import SIGNED, Count, Positive, from_dict, optional, refused
from elastickv.evaluation.generations.text_figures import TextFigures
from elastickv.evaluation.metrics import Estimate
from elastickv.recipe.formats import sixteen_bit
from elastickv.results.kinds.model_result import check_version

EVALUATION_KIND = "elastickv-fidelity"
EVALUATION_VERSION = 1
_ENGINES = {"vllm": "vLLM"}
_ELASTIC, _OPTIONAL = optional("recipes"), optional()


@dataclass(frozen=True)
class EvaluatedModel:
    """The model: heads are those of its `elastic_layers`, with full attention; null where all `layers` are."""

    name: str
    fingerprint: str
    dtype: str
    device: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    elastic_layers: int | None = field(default=None, metadata=_OPTIONAL)
    device_name: str | None = field(default=None, metadata=_OPTIONAL)


@dataclass(frozen=True)
class WindowPrefix:
    """The special tokens that the tokenizer puts before a text, and so before every window: their ids, and spelled out."""

    ids: list[int]
    text: str


@dataclass(frozen=True)
class ScoredText:
    """A text that windows were cut from: its tokens, and its windows and scored tokens over all contexts."""

    name: str
    tokens: Count
    windows: Count
    scored_tokens: Count


@dataclass(frozen=True)
class ScoredWindow:
    """A window of `context` tokens: `prefix_tokens` special ones, then tokens of `text` from number `first` on.

    The tokens of the text from `scored_first` to before `scored_end` are scored, after `context_tokens` tokens of the window.
    """

    text: str
    context: Count
    first: int
    prefix_tokens: int
    context_tokens: Count
    scored_first: int
    scored_end: Count


@dataclass(frozen=True)
class CalibrationSource:
    """The text that the recipes were calibrated on."""

    text: str
    tokens: Count


@dataclass(frozen=True)
class EvaluationEngine:
    """What served the model: name and version, the options that it was started with beside those of the evaluation.

    `reference` and `served` are the environments of the engine with its own cache and of the last one with ElasticKV's.
    """

    name: str
    version: str
    options: dict[str, Any]
    reference: dict[str, Any]
    served: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the name as its project writes it, with the version."""
        return f"{_ENGINES.get(self.name, self.name)} {self.version}"


@dataclass(frozen=True)
class GreedyDivergence:
    """Where greedy text leaves that of full attention; `tokens` is how many each continuation has at most."""

    first_different: list[int]
    same_rows: int
    length_ratio: float
    tokens: Count
    mean_first_different: float


@dataclass(frozen=True)
class StoredFormat:
    """How a KV format stores: bits of a quantized element with its scales, and of any element, exact tokens included.

    `exact_keys` and `exact_values` are tokens that count as 16 bit at the end, the first `sinks` ones among them; `source` is
    the publication, or `recipe`. `exact_dtype` is what these tokens, and those that are quantized later, were rounded to first:
    in older files, which lack it, it was bf16 if the model is fp32.
    """

    bits_per_element: Positive
    stored_bits_per_element: Positive
    sinks: int
    exact_keys: int
    exact_values: int
    source: str
    exact_dtype: str | None = field(default=None, metadata=_OPTIONAL)

    def rounded_to(self, model_dtype: str) -> str:
        """Return the dtype to which numbers were rounded before they were quantized, and exact ones too."""
        return self.exact_dtype or sixteen_bit(model_dtype)


@dataclass(frozen=True)
class MeasuredSelection:
    """A published selection under a budget: `size` tokens or pages of a layer, as `unit` says; its source.

    The first `dense_layers` layers with full attention read everything.
    """

    method: str
    compress: Positive
    size: Count
    unit: str
    dense_layers: int
    source: str


@dataclass(frozen=True)
class LossRow:
    """What one cache costs at one context, against full attention: means with their intervals over windows.

    The fields from `recipe_hash` to `expected_error` are of an elastic cache, `quantiser` and `bits` of Transformers' own
    quantized one, `stored_format` of a KV format that was named, or of formats within a budget of stored bits. A published one
    has no recipe. `selection` is a published selection, which has bytes and no recipe; its C is there.
    """

    context: Count
    cache: str
    compress: Positive | None
    ppl_change_percent: Annotated[Estimate, SIGNED]
    kl: Annotated[Estimate, SIGNED]
    top1_percent: Annotated[Estimate, SIGNED]
    full_ppl: float
    windows: int
    scored_tokens: int
    seconds: float
    recipe_hash: str | None = field(default=None, metadata=_ELASTIC)
    recipes: list[str] | None = field(default=None, metadata=_OPTIONAL)
    read_ratio: Positive | None = field(default=None, metadata=_ELASTIC)
    stored_ratio: Positive | None = field(default=None, metadata=_ELASTIC)
    step_bytes_read: float | None = field(default=None, metadata=_ELASTIC)
    bytes_stored: float | None = field(default=None, metadata=_ELASTIC)
    expected_error: float | None = field(default=None, metadata=_ELASTIC)
    quantiser: str | None = field(default=None, metadata=_OPTIONAL)
    bits: int | None = field(default=None, metadata=_OPTIONAL)
    stored_format: StoredFormat | None = field(default=None, metadata=_OPTIONAL)
    selection: MeasuredSelection | None = field(default=None, metadata=_OPTIONAL)
    greedy: GreedyDivergence | None = field(default=None, metadata=_OPTIONAL)


@dataclass(frozen=True)
class GenerationRow:
    """Texts of at most `tokens` tokens that one cache generates after each window: a greedy one, and `samples` others.

    `full` is full attention itself.
    """

    context: Count
    cache: str
    compress: Positive | None
    windows: Count
    tokens: Count
    samples: int
    greedy: TextFigures
    sampled: TextFigures | None
    seconds: float

    @property
    def of_texts(self) -> dict[str, TextFigures]:
        """How texts were decoded -> their figures."""
        return {"greedy": self.greedy} | ({} if self.sampled is None else {"sampled": self.sampled})


@dataclass(frozen=True)
class PassKeyRow:
    """Pass keys in prompts of one length: for each cache, whether the key at each of `depths` was answered."""

    tokens: Count
    depths: list[float]
    found: dict[str, list[bool]]
    skipped: list[str] = field(default_factory=list)

    def check(self, source: str) -> None:
        """Refuse a row whose answers are not one a depth.

        Raises
        ------
        UsageError : naming the cache.
        """
        for cache, answers in self.found.items():
            if len(answers) != len(self.depths):
                raise refused(source, f"has another number of pass keys than depths for {cache}")


@dataclass(frozen=True)
class TaskScore:
    """One cache on one task: means with their intervals over items; `scores` are of each item, from 0 to 1.

    Differences are to full attention on the same items: `worse` items have a smaller score, `better` ones a larger one. The
    recipe and the ratios are those at the shortest prompt; full attention has none.
    """

    cache: str
    score_percent: Annotated[Estimate, SIGNED]
    difference_points: Annotated[Estimate, SIGNED]
    worse: int
    better: int
    scores: list[float]
    recipe_hash: str | None = field(default=None, metadata=_OPTIONAL)
    read_ratio: Positive | None = field(default=None, metadata=_OPTIONAL)
    stored_ratio: Positive | None = field(default=None, metadata=_OPTIONAL)


@dataclass(frozen=True)
class TaskRow:
    """A task at one length, or the questions of a file with one metric: full attention in two wordings, then the caches.

    `tokens` are those of prompt and answer; of a file, those of the longest.
    """

    task: str
    source: str
    metric: str
    tokens: Count
    answer_tokens: Count
    items: Count
    chat_template: bool
    caches: list[TaskScore]
    seconds: float
    skipped: list[str] = field(default_factory=list)

    def check(self, source: str) -> None:
        """Refuse a row whose scores are not one an item.

        Raises
        ------
        UsageError : naming the cache.
        """
        for cache in self.caches:
            if len(cache.scores) != self.items:
                raise refused(source, f"has another number of scores than items for {cache.cache} on {self.task}")


@dataclass(frozen=True)
class SuggestedRatio:
    """The largest ratio within a tolerance; None where not even the smallest is."""

    tolerance: str
    compress: Positive | None
    certain: bool


@dataclass(frozen=True)
class EvaluationResult:
    """A result of `elastickv eval`; `complete` is False where it was interrupted.

    `texts` are the names of those that were scored, as is `scored_texts`, which older files lack. Without an `engine` the model
    ran in Transformers.
    """

    kind: str
    version: int
    environment: dict[str, Any]
    model: EvaluatedModel
    texts: list[str]
    calibration: CalibrationSource | None
    options: dict[str, Any]
    skipped: list[str]
    rows: list[LossRow]
    needle: list[PassKeyRow]
    suggestion: SuggestedRatio | None
    seconds: float
    complete: bool = True
    command: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    prefix: WindowPrefix | None = field(default=None, metadata=_OPTIONAL)
    scored_texts: list[ScoredText] | None = field(default=None, metadata=_OPTIONAL)
    windows: list[ScoredWindow] | None = field(default=None, metadata=_OPTIONAL)
    generations: list[GenerationRow] | None = field(default=None, metadata=_OPTIONAL)
    tasks: list[TaskRow] = field(default_factory=list)
    engine: EvaluationEngine | None = field(default=None, metadata=_OPTIONAL)

    @property
    def model_name(self) -> str:
        """The model's name, with the engine that served it: its rows are never of one curve with those of Transformers."""
        return self.model.name if self.engine is None else f"{self.model.name} in {self.engine}"

    @property
    def of_formats(self) -> bool:
        """Whether all rows are of KV formats that were named, which have nothing to calibrate.

        Formats that a calibration chose have the error that it expects.
        """
        return bool(self.rows) and all(row.stored_format is not None and row.expected_error is None for row in self.rows)

    @property
    def exact_tokens(self) -> str:
        """Sinks and window that all KV formats had, as in 4+128; nothing where each had its own."""
        exact = self.options.get("exact_tokens")
        return f"{exact.get('sinks')}+{exact.get('window')}" if isinstance(exact, dict) else ""

    @classmethod
    def from_dict(cls, value: Any, source: str = "the result") -> "EvaluationResult":
        """Return these JSON values as a result.

        Raises
        ------
        UsageError : naming the key that is missing, of another type or out of range, or another version.
        """
        check_version(value, EVALUATION_VERSION, source)
        evaluation = from_dict(cls, value, source)
        for row in evaluation.needle:
            row.check(source)
        for task in evaluation.tasks:
            task.check(source)
        return evaluation
