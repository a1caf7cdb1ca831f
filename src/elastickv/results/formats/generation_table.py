"""What generated text took, as text: of `elastickv run` and `elastickv bench --model`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from elastickv.results.formats.html import html_paragraphs, html_table
from elastickv.results.formats.plain_json import dumps
from elastickv.results.formats.rows import as_jsonl, csv_of, markdown_of

_GIB, _MIB = 1 << 30, 1 << 20
_COLUMNS = (
    "cache", "tokens_per_s", "median_step_ms", "floor_ms", "first_token_s", "read_ratio", "stored_ratio", "held_ratio",
    "held_bytes", "peak_bytes",
)  # fmt: skip

# Of a benchmark alone, whose steps are read beside what the machine's memory allows.
_STEP: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("ms a step", lambda c: _number(1e3 * c["rows"] / c["tokens_per_s"], 2)),
    ("  interval", lambda c: f"{c['step_ms']['low']:.2f}..{c['step_ms']['high']:.2f}"),
    ("  floor: weights + KV, once", lambda c: _number(c["floor_ms"], 2)),
    ("  x of the floor", lambda c: _number(c["of_floor"], 2)),
)
_HELD: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (("  1/x of 16 bit", lambda c: _ratio(c["held_ratio"])),)


def generation_table(result: dict[str, Any]) -> str:
    """Return a column for each cache that was measured, then the speed-up and what was not run."""
    return "\n".join([_heading(result), *columns(_grid(result)), *_sentences(result)]) + "\n"


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows as lines whose cells stand below each other, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def with_bounds(figure: dict[str, Any]) -> str:
    """Return an estimate with its interval."""
    return f"{figure['estimate']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def as_html(result: dict[str, Any]) -> str:
    """Return the same for a notebook."""
    headers, *cells = _grid(result)
    return html_paragraphs([_heading(result)]) + html_table(headers, cells, _sentences(result))


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the main figures of a model's benchmark, a row for each cache; None where there is none."""
    model, speedups = result["model"], result["speedups"]
    asked = {name: result[name] for name in ("context", "batch", "compress", "recipe", "calibrated")}
    first = {"model": model["name"], "dtype": model["dtype"], "device": _place(result)} | asked
    return [
        first
        | {name: cache.get(name) for name in _COLUMNS}
        | {f"step_ms_{bound}": cache["step_ms"][bound] for bound in ("low", "high")}
        | {f"speedup_{bound}": (speedups.get(cache["cache"]) or {}).get(bound) for bound in ("estimate", "low", "high")}
        for cache in result["caches"]
    ]


def _markdown(result: dict[str, Any]) -> str:
    return markdown_of(rows(result))


def _csv(result: dict[str, Any]) -> str:
    return csv_of(rows(result))


# Of a model's benchmark; what `run` writes has no steps to make rows of.
FORMATS: dict[str, Callable[[dict[str, Any]], str]] = {
    "table": generation_table,
    "json": dumps,
    "jsonl": as_jsonl,
    "csv": _csv,
    "md": _markdown,
    "html": as_html,
}


def _grid(result: dict[str, Any]) -> list[list[str]]:
    """Return a line of headers and a line a figure."""
    caches = result["caches"]
    lines: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("tokens/s", lambda c: _number(c["tokens_per_s"], 2)),
        *(_STEP if "step_ms" in caches[0] else ()),
        ("first token, s", lambda c: _number(c["first_token_s"], 3)),
        ("  of it storing", lambda c: _storing(c)),
        ("tokens: prompt + new", lambda c: f"{_times(c['rows'])}{c['prompt_tokens']} + {c['new_tokens']}"),
        ("decodes captured", lambda c: _percent(c.get("captured_share"))),
        ("decodes launched ahead", lambda c: _percent(c.get("ahead_share"))),
        ("KV read", lambda c: _bytes(c["kv_read_bytes"])),
        ("  1/C of 16 bit", lambda c: _ratio(c.get("read_ratio"))),
        ("KV stored", lambda c: _bytes(c["kv_stored_bytes"])),
        ("  1/x of 16 bit", lambda c: _ratio(c.get("stored_ratio"))),
        ("KV allocated", lambda c: _bytes(c["kv_allocated_bytes"])),
        ("held, as measured", lambda c: _bytes(c["held_bytes"])),
        *(_HELD if "held_ratio" in caches[0] else ()),
        ("peak beyond weights", lambda c: _bytes(c["peak_bytes"])),
    ]
    return [["", *(cache["cache"] for cache in caches)], *([name, *map(figure, caches)] for name, figure in lines)]


def _sentences(result: dict[str, Any]) -> list[str]:
    lines = []
    for baseline, ratio in (result.get("speedups") or {"stock": result.get("speedup")}).items():
        if ratio is not None:
            lines.append(f"elastic / {baseline}: {with_bounds(ratio)} times as fast, {ratio['samples']} pairs")
    if result.get("noise_floor"):
        lines.append(f"noise floor: {with_bounds(result['noise_floor'])}")
    lines += [f"beware: {flag}" for flag in (result.get("host") or {}).get("flags", [])]
    return [*lines, *(f"not run: {name}: {reason}" for name, reason in result.get("not_run", {}).items())]


def _heading(result: dict[str, Any]) -> str:
    model = result["model"]
    budget = f"recipe {result['recipe']}" if result["compress"] is None else f"compress={result['compress']:g}"
    heading = f"{model['name']}, {model['dtype']}, {_bytes(model['weights_bytes'])} of weights, {budget}, {_place(result)}"
    machine = result.get("machine")
    return heading if machine is None else f"{heading}, reads {machine['read_ceiling_gbs']:.0f} GB/s"


def _place(result: dict[str, Any]) -> str:
    return str(result["model"]["device_name"] or result["environment"]["cpu"] or result["model"]["device"])


def _storing(cache: dict[str, Any]) -> str:
    share = cache.get("storing_share_of_first_token")
    return "" if share is None else f"{cache['storing_s']:.3f} ({100 * share:.1f} %)"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _times(rows: int) -> str:
    return "" if rows == 1 else f"{rows} x "


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _number(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def _bytes(count: float | None) -> str:
    if count is None:
        return ""
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / _MIB:.1f} MiB"
