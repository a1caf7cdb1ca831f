"""The whole evaluation: texts through full attention once, then through every recipe's decode path."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from elastickv.benchmark.environment import environment
from elastickv.benchmark.reporter import Reporter
from elastickv.errors import UsageError
from elastickv.evaluation import sessions
from elastickv.evaluation.divergence import Divergence, divergence, end_tokens, greedy
from elastickv.evaluation.metrics import fidelity
from elastickv.evaluation.needle import ANSWER_TOKENS, Case, answered, cases
from elastickv.evaluation.options import EvaluationOptions
from elastickv.evaluation.prefill import Prefill, check_layers, prefill
from elastickv.evaluation.recipes_by_ratio import RatioRecipes, Span, plan
from elastickv.evaluation.scoring import Open, score
from elastickv.evaluation.suggestion import suggest
from elastickv.evaluation.texts import Text, Window, windows
from elastickv.recipe import AttentionShape, ModelCalibration
from elastickv.transformers.model_loading import Loaded, fingerprint

KIND = "elastickv-fidelity"
VERSION = 1
_DTYPES = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}
STOCK_QUANTISED = "stock-quantized"


@dataclass(frozen=True)
class _Contender:
    """One way to decode: its name, its plan if it is ours, and what opens it."""

    name: str
    plan: RatioRecipes | None
    decoding: Open


def evaluate(
    loaded: Loaded,
    texts: Sequence[Text],
    options: EvaluationOptions,
    calibration: ModelCalibration | None,
    progress: Reporter,
) -> dict[str, Any]:
    """Return the result as JSON values; after Ctrl-C what was finished by then, `complete` false.

    Raises
    ------
    UsageError : before anything is measured, if options, texts, calibration and model do not go together.
    KeyboardInterrupt : if interrupted before the first row was finished.
    """
    subject = _Subject(loaded, calibration)
    prepared = {context: _windows(subject, texts, options, context) for context in options.contexts}
    needles = [
        [
            case
            for seed, text in enumerate(texts[: options.needle_texts])
            for case in cases(loaded.tokenizer, text.content, length, _depths(options.needle_depths), seed)
        ]
        for length in options.needle_lengths
    ]
    subject.check_room(max([*options.contexts, *(n + ANSWER_TOKENS for n in options.needle_lengths)]))
    contenders = {
        context: _contenders(subject, options, Span(context - options.scored - 1, options.scored))
        for context in options.contexts
    }
    if contenders and not any(contender.plan for found, _ in contenders.values() for contender in found):
        raise UsageError("; ".join(dict.fromkeys(reason for _, reasons in contenders.values() for reason in reasons)))
    skipped = [reason for _, reasons in contenders.values() for reason in reasons]
    started, complete = time.monotonic(), True
    rows: list[dict[str, Any]] = []
    retrieval: list[dict[str, Any]] = []
    try:
        for context, found in prepared.items():
            # A list that is extended keeps what came before an interrupt.
            rows.extend(_context_rows(subject, context, found, contenders[context][0], options, progress))
        retrieval.extend(_retrieval(subject, prompts, options, progress) for prompts in needles)
    except KeyboardInterrupt:
        if not rows and not retrieval:
            raise
        complete = False
    return {
        "kind": KIND,
        "version": VERSION,
        "complete": complete,
        "environment": environment() | {"transformers": _version("transformers"), "torch": _version("torch")},
        "model": subject.described(),
        "texts": [text.name for text in texts],
        "calibration": None if calibration is None else {"text": calibration.text, "tokens": calibration.tokens},
        "options": _plain(options),
        "skipped": skipped,
        "rows": rows,
        "needle": retrieval,
        "suggestion": None if options.tolerance is None or not complete else suggest(rows, options.tolerance),
        "seconds": time.monotonic() - started,
    }


class _Subject:
    """The model under test and its calibration."""

    def __init__(self, loaded: Loaded, calibration: ModelCalibration | None) -> None:
        self.loaded, self.model, self.calibration = loaded, loaded.model, calibration
        check_layers(self.model)
        self.config = self.model.config.get_text_config(decoder=True)
        self.fingerprint = fingerprint(self.model)
        if calibration is not None:
            calibration.check_model(self.fingerprint, loaded.name)
        heads = self.config.num_attention_heads
        head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        self.shape = AttentionShape(1, heads, getattr(self.config, "num_key_value_heads", None) or heads, head_dim)
        self.layers = int(self.config.num_hidden_layers)
        self.dtype = _DTYPES[str(self.model.dtype)]

    def check_room(self, tokens: int) -> None:
        """Refuse more tokens than the model has positions."""
        most = getattr(self.config, "max_position_embeddings", None)
        if most is not None and tokens > most:
            raise UsageError(
                f"{tokens} tokens are needed and {self.loaded.name} has {most} positions: give a shorter `context`"
            )

    def described(self) -> dict[str, Any]:
        """Return what the result says of the model."""
        shape = {name: getattr(self.shape, name) for name in ("query_heads", "kv_heads", "head_dim")}
        return {
            "name": self.loaded.name,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "device": str(self.model.device),
            "layers": self.layers,
        } | shape


def _windows(subject: _Subject, texts: Sequence[Text], options: EvaluationOptions, context: int) -> list[Window]:
    if context <= options.scored + 1:
        raise UsageError(f"`context`={context} leaves nothing before the {options.scored} scored tokens: give a longer one")
    return windows(texts, subject.loaded.tokenizer, context, options.window_count)


def _depths(count: int) -> list[float]:
    return [i / max(1, count - 1) for i in range(count)]


def _contenders(subject: _Subject, options: EvaluationOptions, span: Span) -> tuple[list[_Contender], list[str]]:
    """Return the contenders, and why some ratios are none."""
    found, reasons = [], []
    for ratio in options.ratios:
        try:
            made = plan(ratio, span, subject.shape, subject.layers, subject.dtype, subject.calibration)
        except UsageError as error:
            reasons.append(str(error))
            continue
        found.append(_Contender(f"C={ratio:g}", made, _elastic(subject.model, made)))
    if options.reference:
        sessions.quantizer()
        found.append(_Contender(STOCK_QUANTISED, None, lambda start, _: sessions.stock_quantized(subject.model, start)))
    return found, reasons


def _elastic(model: Any, made: RatioRecipes) -> Open:
    return lambda start, tokens: sessions.elastic(model, made.recipes, start, tokens)


def _context_rows(
    subject: _Subject,
    context: int,
    rows: Sequence[Window],
    contenders: Sequence[_Contender],
    options: EvaluationOptions,
    progress: Reporter,
) -> Iterator[dict[str, Any]]:
    progress.phase(f"full attention over {len(rows)} windows of {context} tokens")
    start = prefill(
        subject.model, [row.ids[:-1] for row in rows], context - options.scored - 1, options.scored, progress.progress
    )
    following = [row.ids[start.tokens] for row in rows]
    full = None
    if options.greedy_tokens:
        full = greedy(following, start, lambda begun, _: sessions.stock(subject.model, begun), options.greedy_tokens)
    for contender in contenders:
        progress.phase(f"{contender.name} at {context} tokens")
        began = time.monotonic()
        figures = asdict(fidelity(score(rows, start, contender.decoding, progress.progress)))
        row = {"context": context, "cache": contender.name} | _bytes(contender.plan) | figures
        row |= {"windows": len(rows), "scored_tokens": len(rows) * options.scored, "seconds": time.monotonic() - began}
        if full is not None:
            found = greedy(following, start, contender.decoding, options.greedy_tokens)
            row["greedy"] = _greedy(divergence(full, found, end_tokens(subject.model)))
        yield row


def _bytes(made: RatioRecipes | None) -> dict[str, Any]:
    if made is None:
        return {"compress": None, "quantiser": sessions.quantizer(), "bits": sessions.QUANTISED_BITS[sessions.quantizer()]}
    return {
        "compress": made.ratio,
        "recipe_hash": made.hash,
        "recipes": [str(recipe) for recipe in made.recipes],
        "read_ratio": made.read_ratio,
        "stored_ratio": made.stored_ratio,
        "step_bytes_read": made.step_bytes,
        "bytes_stored": made.stored_bytes,
        "expected_error": made.expected_error,
    }


def _greedy(found: Divergence) -> dict[str, Any]:
    mean = sum(found.first_different) / len(found.first_different)
    return asdict(found) | {"first_different": list(found.first_different), "mean_first_different": mean}


def _retrieval(subject: _Subject, row: Sequence[Case], options: EvaluationOptions, progress: Reporter) -> dict[str, Any]:
    length = row[0].length
    progress.phase(f"pass keys in {length} tokens")
    start: Prefill = prefill(subject.model, [case.ids[:-1] for case in row], length - 1, 1, progress.progress)
    quiet = replace(options, greedy_tokens=0)
    contenders, skipped = _contenders(subject, quiet, Span(length - 1, ANSWER_TOKENS))
    full: Callable[..., Any] = lambda begun, _: sessions.stock(subject.model, begun)  # noqa: E731
    hits = {"full": answered(row, start, full, subject.loaded.tokenizer)}
    for contender in contenders:
        progress.phase(f"pass keys in {length} tokens, {contender.name}")
        hits[contender.name] = answered(row, start, contender.decoding, subject.loaded.tokenizer)
    return {"tokens": length, "depths": [case.depth for case in row], "found": hits, "skipped": skipped}


def _plain(options: EvaluationOptions) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
