"""A fidelity result as Markdown tables, which read well on a terminal too."""

from collections.abc import Iterator, Sequence
from typing import Any

_HEADERS = ("context", "cache", "recipe", "read 1/", "stored 1/", "d-PPL %", "KL", "top-1 %", "greedy leaves at", "length x")


def fidelity_tables(result: dict[str, Any]) -> str:
    """Return what was measured on which model, a table of losses, one of retrieval, and the suggestion."""
    model = result["model"]
    calibration = result["calibration"]
    source = f"calibrated on {calibration['tokens']} tokens of {calibration['text']}" if calibration else "not calibrated"
    lines = [
        f"{model['name']} ({model['fingerprint']}), {model['dtype']} on {model['device']}, {source}; "
        f"texts: {', '.join(result['texts'])}",
        "",
        *_table(_HEADERS, [_loss_row(row) for row in result["rows"]]),
        "",
        "Means with 95 % bootstrap intervals over windows, against full attention.",
    ]
    if result["needle"]:
        lines += ["", *_retrieval(result["needle"])]
    lines += ["", *(f"left out: {reason}" for reason in result["skipped"])] if result["skipped"] else []
    if not result.get("complete", True):
        lines += ["", "Interrupted: incomplete. Rows and pass keys that are missing were not measured."]
    if result["suggestion"] is not None:
        lines += ["", _suggested(result["suggestion"])]
    return "\n".join(lines) + "\n"


def _loss_row(row: dict[str, Any]) -> list[str]:
    greedy = row.get("greedy")
    return [
        str(row["context"]),
        row["cache"],
        row.get("recipe_hash") or f"{row.get('quantiser')}, {row.get('bits')} bits",
        f"{row['read_ratio']:.2f}" if "read_ratio" in row else "",
        f"{row['stored_ratio']:.2f}" if "stored_ratio" in row else "",
        _interval(row["ppl_change_percent"], 2, True),
        _interval(row["kl"], 4),
        _interval(row["top1_percent"], 1),
        f"{greedy['mean_first_different']:.0f} of {greedy['tokens']}" if greedy else "",
        f"{greedy['length_ratio']:.2f}" if greedy else "",
    ]


def _interval(figure: dict[str, float], places: int, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{figure['mean']:{sign}.{places}f} [{figure['low']:.{places}f}, {figure['high']:.{places}f}]"


def _retrieval(needle: Sequence[dict[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in needle for name in row["found"]))
    yield from _table(
        ("pass key in", *names),
        [[f"{row['tokens']} tokens", *(_hits(row["found"].get(name)) for name in names)] for row in needle],
    )
    yield ""
    yield "Pass keys found; x and . are depths from the beginning to the end."


def _hits(found: Sequence[bool] | None) -> str:
    if found is None:
        return ""
    return f"{sum(found)}/{len(found)} {''.join('x' if hit else '.' for hit in found)}"


def _suggested(suggestion: dict[str, Any]) -> str:
    if suggestion["compress"] is None:
        return f"No C that was measured is within {suggestion['tolerance']}."
    note = "" if suggestion["certain"] else " (its interval is not: measure more windows)"
    return f"Largest C within {suggestion['tolerance']}: {suggestion['compress']:g}{note}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return [line(headers), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)]
