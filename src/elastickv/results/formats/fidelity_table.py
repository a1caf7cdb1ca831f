"""A fidelity result as Markdown tables, which read well on a terminal too."""

from collections.abc import Iterator, Sequence

from elastickv.evaluation.metrics import Estimate
from elastickv.results.formats.rows import markdown_cell
from elastickv.results.formats.units import fixed
from elastickv.results.kinds.evaluation_result import EvaluationResult, LossRow, PassKeyRow, SuggestedRatio

_HEADERS = ("context", "cache", "recipe", "read 1/", "stored 1/", "d-PPL %", "KL", "top-1 %", "greedy leaves at", "length x")


def fidelity_tables(result: EvaluationResult) -> str:
    """Return the model, a table of losses, one of retrieval, and the suggestion."""
    model, calibration = result.model, result.calibration
    source = f"calibrated on {calibration.tokens} tokens of {calibration.text}" if calibration else "not calibrated"
    heading = f"{model.name} ({model.fingerprint}), {model.dtype} on {model.device}, {source}; texts: {', '.join(result.texts)}"
    lines = [
        markdown_cell(heading),
        "",
        *_table(_HEADERS, [_loss_row(row) for row in result.rows]),
        "",
        "Means with 95 % bootstrap intervals over windows, against full attention.",
    ]
    if result.needle:
        lines += ["", *_retrieval(result.needle)]
    lines += ["", *(f"left out: {markdown_cell(reason)}" for reason in result.skipped)] if result.skipped else []
    if not result.complete:
        lines += ["", "Interrupted: incomplete. Rows and pass keys that are missing were not measured."]
    if result.suggestion is not None:
        lines += ["", _suggested(result.suggestion)]
    return "\n".join(lines) + "\n"


def _loss_row(row: LossRow) -> list[str]:
    greedy = row.greedy
    return [
        str(row.context),
        row.cache,
        row.recipe_hash or f"{row.quantiser}, {row.bits} bits",
        fixed(row.read_ratio, 2),
        fixed(row.stored_ratio, 2),
        _interval(row.ppl_change_percent, 2, True),
        _interval(row.kl, 4),
        _interval(row.top1_percent, 1),
        f"{greedy.mean_first_different:.0f} of {greedy.tokens}" if greedy else "",
        f"{greedy.length_ratio:.2f}" if greedy else "",
    ]


def _interval(figure: Estimate, digits: int, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{figure.mean:{sign}.{digits}f} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"


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
