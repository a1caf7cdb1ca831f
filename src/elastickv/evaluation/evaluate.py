"""The whole evaluation: texts through full attention once, then through every recipe, KV format and selection."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from elastickv.benchmark.reporter import Reporter
from elastickv.errors import UsageError
from elastickv.evaluation import sessions
from elastickv.evaluation.evaluation_inputs import EvaluationInputs
from elastickv.evaluation.evaluation_options import EvaluationOptions
from elastickv.evaluation.format_paths import format_paths, refused_formats, stored_bits_paths, unmet_budgets
from elastickv.evaluation.generations.continuations import continuations
from elastickv.evaluation.generations.divergence import divergence, end_tokens
from elastickv.evaluation.generations.generation_rows import generation_rows
from elastickv.evaluation.metrics import fidelity
from elastickv.evaluation.needle import ANSWER_TOKENS, Case, answered
from elastickv.evaluation.prefill import Prefill, prefill
from elastickv.evaluation.recipe_parts import part_paths
from elastickv.evaluation.recipes_by_ratio import Span
from elastickv.evaluation.records.evaluation_record import EvaluationRecord, loss_row
from elastickv.evaluation.records.scored_windows import unscored
from elastickv.evaluation.scoring import score
from elastickv.evaluation.selection_paths import selection_paths
from elastickv.evaluation.subject import DecodePath, Subject, decode_paths
from elastickv.evaluation.tasks.measured_tasks import PlannedTask, planned_tasks, task_rows
from elastickv.evaluation.texts import Text, Window
from elastickv.recipe import ModelCalibration
from elastickv.transformers.model_loading import Loaded


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
    progress.phase("choosing windows and recipes")
    subject = Subject(loaded, calibration)
    over_budget = unmet_budgets(subject, options.stored_bits)
    inputs = EvaluationInputs.of(texts, loaded.tokenizer, options)
    subject.check_room(max([0, *options.contexts, *(n + ANSWER_TOKENS for n in options.needle_lengths)]))
    generated = [context - options.scored + options.generation.tokens for context in options.contexts]
    subject.check_room(max(generated, default=0), "a shorter `context`, or fewer tokens to `generate`")
    tasks = planned_tasks(subject, options)
    if any(ratio > 1 for ratio in options.ratios):
        subject.judge_keys(_first_prompt(inputs, tasks))
    paths: dict[int, list[DecodePath]] = {}
    skipped, unmet = unscored(texts, options.window_count, inputs.haystacks), list[str]()
    for context in options.contexts:
        span = Span(context - options.scored - 1, options.scored)
        paths[context], reasons = _paths(subject, options, span)
        unmet += reasons
    if unmet and paths and not any(path.figures["compress"] for of_context in paths.values() for path in of_context):
        raise UsageError("; ".join(dict.fromkeys(unmet)))
    skipped += [*unmet, *over_budget, *refused_formats(subject, options.formats).values()]
    packages = ("transformers", "torch")
    record = EvaluationRecord(packages, subject.described(), texts, loaded.tokenizer, inputs, options, calibration, skipped)

    def add(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
        rows.append(row)
        if measured is not None:
            measured(record.as_dict(complete=False))

    try:
        for context, scored_windows in inputs.windows.items():
            wanted = [path for path in paths[context] if path.name not in done]
            start = _prefill(subject, context, scored_windows, options, progress)
            for row in _context_rows(subject, context, scored_windows, start, wanted, options, progress):
                add(record.rows, row)
            for row in generation_rows(subject, scored_windows, start, wanted, options.generation, progress):
                add(record.generations, row)
            del start
        record.needle.extend(_retrieval(subject, prompts, options, progress) for prompts in inputs.pass_keys)
        record.tasks.extend(task_rows(subject, tasks, lambda span: _paths(subject, options, span), progress))
    except KeyboardInterrupt:
        if record.empty:
            raise
        return record.as_dict(complete=False)
    return record.as_dict(complete=True)


def _first_prompt(inputs: EvaluationInputs, tasks: Sequence[PlannedTask]) -> Sequence[int]:
    for windows in inputs.windows.values():
        return windows[0].ids
    for cases in inputs.pass_keys:
        return cases[0].ids
    return next((task.item(0)[0].ids for task in tasks), ())


def _paths(subject: Subject, options: EvaluationOptions, span: Span) -> tuple[list[DecodePath], list[str]]:
    """Return the decode paths at one context, and the reasons why a ratio or a selection has none."""
    paths, reasons = decode_paths(subject, options.ratios, span, options.reference)
    parts = part_paths(subject, options.parts, span)
    within = stored_bits_paths(subject, options.stored_bits, options.exact_tokens, span)
    formats = format_paths(subject, options.formats, options.exact_tokens, span)
    selected, unselected = selection_paths(subject, options.selections, options.ratios, span)
    return [*paths, *parts, *within, *formats, *selected], [*reasons, *unselected]


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
        losses = fidelity(score(rows, start, path.decoding, progress.progress))
        row = loss_row(context, path.name, path.figures, losses, len(rows), options.scored, began)
        if full is not None:
            progress.phase(f"{path.name} continues them")
            generated = continuations(following, start, path.decoding, options.greedy_tokens, progress.progress)
            row["greedy"] = divergence(full, generated, end_tokens(subject.model)).as_dict()
        yield row


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
