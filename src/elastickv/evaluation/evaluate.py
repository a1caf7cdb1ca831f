"""The whole evaluation: texts through full attention once, then through every recipe, KV format and selection."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from elastickv.benchmark.environment import environment
from elastickv.benchmark.reporter import Reporter
from elastickv.errors import UsageError
from elastickv.evaluation import sessions
from elastickv.evaluation.evaluation_options import EvaluationOptions
from elastickv.evaluation.format_paths import format_paths, refused_formats, stored_bits_paths, unmet_budgets
from elastickv.evaluation.generations.continuations import continuations
from elastickv.evaluation.generations.divergence import Divergence, divergence, end_tokens
from elastickv.evaluation.generations.generation_rows import generation_rows
from elastickv.evaluation.metrics import fidelity
from elastickv.evaluation.needle import ANSWER_TOKENS, Case, answered, cases
from elastickv.evaluation.prefill import Prefill, prefill
from elastickv.evaluation.recipe_parts import part_paths
from elastickv.evaluation.recipes_by_ratio import Span
from elastickv.evaluation.scored_windows import unscored, window_records
from elastickv.evaluation.scoring import score
from elastickv.evaluation.selection_paths import selection_paths
from elastickv.evaluation.subject import DecodePath, Subject, decode_paths
from elastickv.evaluation.suggestion import suggest
from elastickv.evaluation.tasks.measured_tasks import planned_tasks, task_rows
from elastickv.evaluation.texts import Text, Window, windows
from elastickv.recipe import ModelCalibration
from elastickv.transformers.model_loading import Loaded
from elastickv.transformers.tokenization import text_prefix

KIND = "elastickv-fidelity"
VERSION = 1


def evaluate(
    loaded: Loaded,
    texts: Sequence[Text],
    options: EvaluationOptions,
    calibration: ModelCalibration | None,
    progress: Reporter,
    done: Collection[str] = (),
    measured: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Return the result as JSON values; after Ctrl-C, what was finished by then, with `complete` false.

    Parameters
    ----------
    done : names of caches that are left out, as rows have them: an earlier evaluation measured them.
    measured : called after each row with what the result is so far, `complete` false.

    Raises
    ------
    UsageError : before anything is measured, if options, texts, calibration and model do not match.
    KeyboardInterrupt : if interrupted before the first row was finished.
    """
    if not (options.ratios or options.formats or options.stored_bits):
        raise UsageError("nothing is measured: give values of C in `compress`, or `formats`, or `stored_bits`")
    if not (options.contexts or options.needle_lengths or options.tasks or options.datasets):
        raise UsageError("nothing is measured: give `context`, `needle`, `tasks` or `dataset`")
    if options.tolerance is not None and not options.contexts:
        raise UsageError("`tolerance` is of windows, and there are none: give their tokens in `context`")
    progress.phase("choosing windows and recipes")
    subject = Subject(loaded, calibration)
    over_budget = unmet_budgets(subject, options.stored_bits)
    context_windows = {context: _windows(subject, texts, options, context) for context in options.contexts}
    haystacks = options.needle_texts if options.needle_lengths else 0
    needles = [
        [
            case
            for seed, text in enumerate(texts[:haystacks])
            for case in cases(loaded.tokenizer, text.content, length, _depths(options.needle_depths), seed)
        ]
        for length in options.needle_lengths
    ]
    subject.check_room(max([0, *options.contexts, *(n + ANSWER_TOKENS for n in options.needle_lengths)]))
    generated = [context - options.scored + options.generation.tokens for context in options.contexts]
    subject.check_room(max(generated, default=0), "a shorter `context`, or fewer tokens to `generate`")
    tasks = planned_tasks(subject, options)
    paths: dict[int, list[DecodePath]] = {}
    skipped, unmet = unscored(texts, options.window_count, haystacks), list[str]()
    for context in options.contexts:
        span = Span(context - options.scored - 1, options.scored)
        paths[context], reasons = _paths(subject, options, span)
        unmet += reasons
    if unmet and paths and not any(path.figures["compress"] for of_context in paths.values() for path in of_context):
        raise UsageError("; ".join(dict.fromkeys(unmet)))
    skipped += [*unmet, *over_budget, *refused_formats(subject, options.formats).values()]
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    generations: list[dict[str, Any]] = []
    retrieval: list[dict[str, Any]] = []
    task_results: list[dict[str, Any]] = []

    described = {
        "environment": environment() | {"transformers": _version("transformers"), "torch": _version("torch")},
        "model": subject.described(),
        **window_records(texts, loaded.tokenizer, context_windows, options.scored, haystacks),
        "calibration": None if calibration is None else {"text": calibration.text, "tokens": calibration.tokens},
        "options": _plain(options),
        "skipped": skipped,
    }

    def result(complete: bool) -> dict[str, Any]:
        return {
            "kind": KIND,
            "version": VERSION,
            "complete": complete,
            **described,
            "rows": rows,
            "generations": generations,
            "needle": retrieval,
            **({"tasks": task_results} if options.tasks or options.datasets else {}),
            "suggestion": None if options.tolerance is None or not complete else suggest(rows, options.tolerance),
            "seconds": time.monotonic() - started,
        }

    try:
        for context, scored_windows in context_windows.items():
            wanted = [path for path in paths[context] if path.name not in done]
            start = _prefill(subject, context, scored_windows, options, progress)
            for row in _context_rows(subject, context, scored_windows, start, wanted, options, progress):
                rows.append(row)
                if measured is not None:
                    measured(result(complete=False))
            for row in generation_rows(subject, scored_windows, start, wanted, options.generation, progress):
                generations.append(row)
                if measured is not None:
                    measured(result(complete=False))
            del start
        retrieval.extend(_retrieval(subject, prompts, options, progress) for prompts in needles)
        task_results.extend(task_rows(subject, tasks, lambda span: _paths(subject, options, span), progress))
    except KeyboardInterrupt:
        if not rows and not retrieval and not task_results:
            raise
        return result(complete=False)
    return result(complete=True)


def _windows(subject: Subject, texts: Sequence[Text], options: EvaluationOptions, context: int) -> list[Window]:
    if context <= options.scored + max(1, len(text_prefix(subject.loaded.tokenizer))):
        raise UsageError(f"`context`={context} leaves nothing before the {options.scored} scored tokens: give a longer one")
    return windows(texts, subject.loaded.tokenizer, context, options.window_count)


def _paths(subject: Subject, options: EvaluationOptions, span: Span) -> tuple[list[DecodePath], list[str]]:
    """Return the decode paths at one context, and the reasons why a ratio or a selection has none."""
    paths, reasons = decode_paths(subject, options.ratios, span, options.reference)
    parts = part_paths(subject, options.parts, span)
    within = stored_bits_paths(subject, options.stored_bits, options.exact_tokens, span)
    formats = format_paths(subject, options.formats, options.exact_tokens, span)
    selected, unselected = selection_paths(subject, options.selections, options.ratios, span)
    return [*paths, *parts, *within, *formats, *selected], [*reasons, *unselected]


def _depths(count: int) -> list[float]:
    return [i / max(1, count - 1) for i in range(count)]


def _prefill(subject: Subject, context: int, rows: Sequence[Window], options: EvaluationOptions, progress: Reporter) -> Prefill:
    progress.phase(f"full attention over {len(rows)} windows of {context} tokens")
    stored = context - options.scored - 1
    return prefill(subject.model, [row.ids[:-1] for row in rows], stored, options.scored, progress.progress)


def _context_rows(
    subject: Subject,
    context: int,
    rows: Sequence[Window],
    start: Prefill,
    paths: Sequence[DecodePath],
    options: EvaluationOptions,
    progress: Reporter,
) -> Iterator[dict[str, Any]]:
    following = [row.ids[start.tokens] for row in rows]
    full = None
    if options.greedy_tokens:
        progress.phase(f"full attention continues {len(rows)} windows of {context} tokens")
        stock: Callable[..., Any] = lambda begun, _: sessions.stock(subject.model, begun)  # noqa: E731
        full = continuations(following, start, stock, options.greedy_tokens, progress.progress)
    for path in paths:
        progress.phase(f"{path.name} at {context} tokens")
        began = time.monotonic()
        figures = asdict(fidelity(score(rows, start, path.decoding, progress.progress)))
        row = {"context": context, "cache": path.name} | path.figures | figures
        row |= {"windows": len(rows), "scored_tokens": len(rows) * options.scored, "seconds": time.monotonic() - began}
        if full is not None:
            progress.phase(f"{path.name} continues them")
            generated = continuations(following, start, path.decoding, options.greedy_tokens, progress.progress)
            row["greedy"] = _greedy(divergence(full, generated, end_tokens(subject.model)))
        yield row


def _greedy(compared: Divergence) -> dict[str, Any]:
    mean = sum(compared.first_different) / len(compared.first_different)
    return asdict(compared) | {"first_different": list(compared.first_different), "mean_first_different": mean}


def _retrieval(subject: Subject, row: Sequence[Case], options: EvaluationOptions, progress: Reporter) -> dict[str, Any]:
    length = row[0].length
    progress.phase(f"pass keys in {length} tokens")
    start: Prefill = prefill(subject.model, [case.ids[:-1] for case in row], length - 1, 1, progress.progress)
    paths, skipped = _paths(subject, options, Span(length - 1, ANSWER_TOKENS))
    full: Callable[..., Any] = lambda begun, _: sessions.stock(subject.model, begun)  # noqa: E731
    hits = {"full": answered(row, start, full, subject.loaded.tokenizer, progress.progress)}
    for path in paths:
        progress.phase(f"pass keys in {length} tokens, {path.name}")
        hits[path.name] = answered(row, start, path.decoding, subject.loaded.tokenizer, progress.progress)
    return {"tokens": length, "depths": [case.depth for case in row], "found": hits, "skipped": skipped}


def _plain(options: EvaluationOptions) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
