"""A fidelity result as Markdown tables, which read well on a terminal too."""

from collections.abc import Iterator, Sequence

from elastickv.evaluation.metrics import Estimate
from elastickv.results.formats.generated_texts_table import TEXT_HEADERS, described, generated_texts
from elastickv.results.formats.rows import markdown_cell
from elastickv.results.formats.task_table import task_lines
from elastickv.results.formats.units import fixed, size
from elastickv.results.kinds.evaluation_result import (
    EvaluatedModel,
    EvaluationResult,
    LossRow,
    MeasuredSelection,
    PassKeyRow,
    StoredFormat,
    SuggestedRatio,
)

_FORMAT_HEADERS = ("context", "format", "bits", "stored bits", "exact K / V", "from", "d-PPL %", "KL", "top-1 %", "source")
_SELECTION_HEADERS = (
    "context", "selection", "reads", "read 1/", "stored 1/", "bytes read", "d-PPL %", "KL", "top-1 %", "source",
)  # fmt: skip
_HEADERS = ("context", "cache", "recipe", "read 1/", "stored 1/", "d-PPL %", "KL", "top-1 %", "greedy leaves at", "length x")
_SERVED = "The reference is the engine's own cache. Tokens of prompts, too, read pages where these are older than the window."


def fidelity_tables(result: EvaluationResult) -> str:
    """Return the model, a table of losses, one of retrieval, and the suggestion."""
    model, calibration = result.model, result.calibration
    source = f", calibrated on {calibration.tokens} tokens of {calibration.text}" if calibration else ", not calibrated"
    if result.of_formats:
        source = ""
    texts = _texts(result)
    heading = f"{result.model_name} ({model.fingerprint}), {model.dtype} on {model.device}{source}"
    lines = [
        markdown_cell(f"{heading}; texts: {texts}" if texts else heading),
        *_windows(result),
        *([_SERVED] if result.engine else []),
    ]
    if result.rows:
        lines += ["", *_losses(result.rows, model.dtype)]
        lines += ["Means with 95 % bootstrap intervals over windows, against full attention."]
        lines += ["One window alone has no interval."] if any(row.windows == 1 for row in result.rows) else []
    lines += _layers(model)
    if result.generations:
        lines += ["", *_table(TEXT_HEADERS, generated_texts(result.generations)), "", described(result.generations)]
    if result.needle:
        lines += ["", *_retrieval(result.needle)]
    lines += task_lines(result.tasks)
    lines += ["", *(f"left out: {markdown_cell(reason)}" for reason in result.skipped)] if result.skipped else []
    if not result.complete:
        lines += ["", "Incomplete. Rows and pass keys that are missing were not measured."]
    if result.suggestion is not None:
        lines += ["", _suggested(result.suggestion)]
    return "\n".join(lines) + "\n"


def _losses(rows: Sequence[LossRow], dtype: str) -> Iterator[str]:
    """Yield a table of caches, one of selections and one of KV formats, with a line after each of the last two."""
    caches = [_loss_row(row) for row in rows if row.stored_format is None and row.selection is None]
    if caches:
        yield from (*_table(_HEADERS, caches), "")
    selections = [_selection_row(row, row.selection) for row in rows if row.selection is not None]
    if selections:
        yield from (*_table(_SELECTION_HEADERS, selections), "")
        yield "Bytes read of one sequence in a step, by all layers with full attention, the mean over the scored tokens."
        yield ""
    formats = [_format_row(row, row.stored_format, dtype) for row in rows if row.stored_format is not None]
    if formats:
        yield from (*_table(_FORMAT_HEADERS, formats), "")
        yield "Bits of a quantized element with its scales; stored bits count codebooks and exact tokens too, as at the end."
        yield ""
        yield "Numbers have the dtype in `from` before they are quantized, and where they stay exact."
    yield from dict.fromkeys(map(_by_layer, (row for row in rows if row.stored_format and len(set(row.recipes or ())) > 1)))


def _by_layer(row: LossRow) -> str:
    """Return which layers have which recipe, numbered among those with full attention."""
    layers: dict[str, list[int]] = {}
    for number, recipe in enumerate(row.recipes or ()):
        layers.setdefault(recipe, []).append(number)
    each = "; ".join(f"{recipe} in {_ranges(numbers)}" for recipe, numbers in layers.items())
    return markdown_cell(f"{row.cache}, layers with full attention from 0 on: {each}.")


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers with ranges of three and more in short: 0, 2-5."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    runs = zip(starts, ends, strict=True)
    parts = (f"{a}-{b}" if b > a + 1 else f"{a}, {b}" if b > a else f"{a}" for a, b in runs)
    return ", ".join(parts)


def _texts(result: EvaluationResult) -> str:
    if result.scored_texts is None:
        return ", ".join(result.texts)
    return ", ".join(f"{text.name} ({text.tokens} tokens)" for text in result.scored_texts)


def _windows(result: EvaluationResult) -> Iterator[str]:
    """Yield how windows begin, and for each context where they are and what is scored."""
    if result.prefix is not None and (result.windows or result.rows or result.needle):
        ids = ", ".join(map(str, result.prefix.ids))
        begins = f"with `{result.prefix.text}` ({ids}), which counts as a part of it" if ids else "without a special token"
        yield f"Every window begins {begins}."
    windows = result.windows or []
    for context in dict.fromkeys(window.context for window in windows):
        mine = [window for window in windows if window.context == context]
        scored = mine[0].scored_end - mine[0].scored_first
        starts = "; ".join(
            f"{markdown_cell(name)} from token {', '.join(str(window.first) for window in mine if window.text == name)}"
            for name in dict.fromkeys(window.text for window in mine)
        )
        yield f"Windows of {context} tokens: {starts}; the last {scored} are scored, after {mine[0].context_tokens} of context."


def _layers(model: EvaluatedModel) -> list[str]:
    if model.elastic_layers in (None, model.layers):
        return []
    return [
        f"{model.elastic_layers} of {model.layers} layers have full attention: recipes and ratios are theirs; the others keep "
        "Transformers' own cache."
    ]


def _loss_row(row: LossRow) -> list[str]:
    greedy, alone = row.greedy, row.windows == 1
    return [
        str(row.context),
        row.cache,
        row.recipe_hash or f"{row.quantiser}, {row.bits} bits",
        fixed(row.read_ratio, 2),
        fixed(row.stored_ratio, 2),
        _interval(row.ppl_change_percent, 2, "+", alone),
        _interval(row.kl, 4, "", alone),
        _interval(row.top1_percent, 1, "", alone),
        f"{greedy.mean_first_different:.0f} of {greedy.tokens}" if greedy else "",
        f"{greedy.length_ratio:.2f}" if greedy else "",
    ]


def _format_row(row: LossRow, stored: StoredFormat, dtype: str) -> list[str]:
    alone = row.windows == 1
    return [
        str(row.context),
        row.cache,
        f"{stored.bits_per_element:.3f}",
        f"{stored.stored_bits_per_element:.3f}",
        f"{stored.exact_keys} / {stored.exact_values}",
        stored.rounded_to(dtype),
        _interval(row.ppl_change_percent, 2, "+", alone),
        _interval(row.kl, 6, "", alone),
        _interval(row.top1_percent, 1, "", alone),
        row.recipe_hash or stored.source,
    ]


def _selection_row(row: LossRow, selection: MeasuredSelection) -> list[str]:
    alone = row.windows == 1
    dense = f", {selection.dense_layers} layers all" if selection.dense_layers else ""
    return [
        str(row.context),
        row.cache,
        f"{selection.size} {selection.unit}{dense}",
        fixed(row.read_ratio, 2),
        fixed(row.stored_ratio, 2),
        size(row.step_bytes_read or 0),
        _interval(row.ppl_change_percent, 2, "+", alone),
        _interval(row.kl, 4, "", alone),
        _interval(row.top1_percent, 1, "", alone),
        selection.source,
    ]


def _interval(figure: Estimate, digits: int, sign: str, alone: bool) -> str:
    """Return a mean with its interval, which the figure of a single window lacks."""
    mean = f"{figure.mean:{sign}.{digits}f}"
    return mean if alone else f"{mean} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"


def _retrieval(rows: Sequence[PassKeyRow]) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in rows for name in row.found))
    yield from _table(
        ("pass key in", *names),
        [[f"{row.tokens} tokens", *(_hits(row.found.get(name)) for name in names)] for row in rows],
    )
    yield ""
    yield "Pass keys found; x and . are depths from the beginning to the end."


def _hits(answers: Sequence[bool] | None) -> str:
    if answers is None:
        return ""
    return f"{sum(answers)}/{len(answers)} {''.join('x' if hit else '.' for hit in answers)}"


def _suggested(suggestion: SuggestedRatio) -> str:
    if suggestion.compress is None:
        return f"No C that was measured is within {markdown_cell(suggestion.tolerance)}."
    note = "" if suggestion.certain else " (its interval is not: measure more windows)"
    return f"Largest C within {markdown_cell(suggestion.tolerance)}: {suggestion.compress:g}{note}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    headers, *rows = ([markdown_cell(cell) for cell in cells] for cells in (headers, *rows))
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return [line(headers), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)]
