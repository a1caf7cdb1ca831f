"""What generated text took, as text: of `elastickv run` and `elastickv bench --model`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from elastickv.benchmark.stats.intervals import Interval
from elastickv.results.formats.html import html_paragraphs, html_table
from elastickv.results.formats.rows import as_json, as_jsonl, csv_of, markdown_of
from elastickv.results.kinds.model_result import CacheRecord, ModelBenchResult, RunResult, device_name

_GIB, _MIB = 1 << 30, 1 << 20
_COLUMNS = (
    "cache", "tokens_per_s", "median_step_ms", "floor_ms", "first_token_s", "read_ratio", "stored_ratio", "held_ratio",
    "held_bytes", "peak_bytes",
)  # fmt: skip

Figure = Callable[[CacheRecord], str]
# Of a benchmark alone, which compares a step with what the memory bandwidth allows.
_STEP: tuple[tuple[str, Figure], ...] = (
    ("ms a step", lambda c: _number(c.tokens_per_s and 1e3 * c.rows / c.tokens_per_s, 2)),
    ("  interval", lambda c: f"{c.step_ms.low:.2f}..{c.step_ms.high:.2f}" if c.step_ms else ""),
    ("  floor: weights + KV, once", lambda c: _number(c.floor_ms, 2)),
    ("  x of the floor", lambda c: _number(c.of_floor, 2)),
)
_OF_MODEL = ("model_stored_ratio", "model_held_ratio")


def generation_table(result: RunResult | ModelBenchResult) -> str:
    """Return a column for each cache that was measured, then the speed-up and what was not run."""
    return "\n".join([_heading(result), *columns(_grid(result)), *_sentences(result)]) + "\n"


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows as lines of aligned cells, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def with_bounds(figure: Interval) -> str:
    """Return an estimate with its interval."""
    return f"{figure.estimate:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def as_html(result: ModelBenchResult) -> str:
    """Return the same for a notebook."""
    headers, *cells = _grid(result)
    return html_paragraphs([_heading(result)]) + html_table(headers, cells, _sentences(result))


def rows(result: ModelBenchResult) -> list[dict[str, Any]]:
    """Return the main figures of a model's benchmark, a row for each cache; None where there is none."""
    options = {name: getattr(result, name) for name in ("context", "batch", "compress", "recipe", "calibrated")}
    of_model = [name for name in _OF_MODEL if any(getattr(cache, name) is not None for cache in result.caches)]
    common = {"model": result.model.name, "dtype": result.model.dtype, "device": result.device} | options
    return [
        common
        | {name: getattr(cache, name) for name in (*_COLUMNS, *of_model)}
        | {f"step_ms_{bound}": getattr(cache.step_ms, bound, None) for bound in ("low", "high")}
        | {f"speedup_{bound}": getattr(result.speedups.get(cache.cache), bound, None) for bound in ("estimate", "low", "high")}
        for cache in result.caches
    ]


def _markdown(result: ModelBenchResult) -> str:
    return markdown_of(rows(result))


def _csv(result: ModelBenchResult) -> str:
    return csv_of(rows(result))


# Of a model's benchmark; what `run` writes has no steps to make rows of.
FORMATS: dict[str, Callable[[Any], str]] = {
    "table": generation_table,
    "json": as_json,
    "jsonl": as_jsonl,
    "csv": _csv,
    "md": _markdown,
    "html": as_html,
}


def _grid(result: RunResult | ModelBenchResult) -> list[list[str]]:
    """Return a line of headers and a line a figure."""
    bench = isinstance(result, ModelBenchResult)
    lines: list[tuple[str, Figure]] = [
        ("tokens/s", lambda c: _number(c.tokens_per_s, 2)),
        *(_STEP if bench else ()),
        ("first token, s", lambda c: _number(c.first_token_s, 3)),
        ("  of it storing", _storing),
        ("tokens: prompt + new", lambda c: f"{_times(c.rows)}{c.prompt_tokens} + {c.new_tokens}"),
        ("decodes captured", lambda c: _percent(c.captured_share)),
        ("decodes launched speculatively", lambda c: _percent(c.ahead_share)),
        ("KV read", lambda c: _bytes(c.kv_read_bytes)),
        ("  1/C of 16 bit", lambda c: _ratio(c.read_ratio)),
        ("KV stored", lambda c: _bytes(c.kv_stored_bytes)),
        *_against_dense(result, lambda c: c.stored_ratio, lambda c: c.model_stored_ratio),
        ("KV allocated", lambda c: _bytes(c.kv_allocated_bytes)),
        ("held, as measured", lambda c: _bytes(c.held_bytes)),
        *(_against_dense(result, lambda c: c.held_ratio, lambda c: c.model_held_ratio) if bench else ()),
        ("peak beyond weights", lambda c: _bytes(c.peak_bytes)),
    ]
    caches = result.caches
    return [["", *(cache.cache for cache in caches)], *([name, *map(figure, caches)] for name, figure in lines)]


def _against_dense(
    result: RunResult | ModelBenchResult,
    ratio: Callable[[CacheRecord], float | None],
    of_model: Callable[[CacheRecord], float | None],
) -> list[tuple[str, Figure]]:
    """Return the line of a ratio; for a model with other layers than those of full attention, one for each."""
    if all(of_model(cache) is None for cache in result.caches):
        return [("  1/x of 16 bit", lambda c: _ratio(ratio(c)))]
    return [
        ("  1/x of 16 bit, elastic layers", lambda c: _ratio(ratio(c))),
        ("  1/x of 16 bit, all layers", lambda c: _ratio(of_model(c))),
    ]


def _sentences(result: RunResult | ModelBenchResult) -> list[str]:
    ratios = result.speedups if isinstance(result, ModelBenchResult) else {"stock": result.speedup}
    lines = [
        f"elastic / {baseline}: {with_bounds(ratio)} times as fast, {ratio.samples} pairs"
        for baseline, ratio in ratios.items()
        if ratio is not None
    ]
    if result.noise_floor:
        lines.append(f"noise floor: {with_bounds(result.noise_floor)}")
    if not isinstance(result, ModelBenchResult):
        return lines
    lines += [f"beware: {flag}" for flag in result.host_flags]
    return [*lines, *(f"not run: {name}: {reason}" for name, reason in result.not_run.items())]


def _heading(result: RunResult | ModelBenchResult) -> str:
    model = result.model
    budget = f"recipe {result.recipe}" if result.compress is None else f"compress={result.compress:g}"
    device = device_name(model, result.environment)
    heading = f"{model.name}, {model.dtype}, {_bytes(model.weights_bytes)} of weights, {budget}, {device}"
    ceiling = result.read_ceiling_gbs if isinstance(result, ModelBenchResult) else None
    return heading if ceiling is None else f"{heading}, reads {ceiling:.0f} GB/s"


def _storing(cache: CacheRecord) -> str:
    share, seconds = cache.storing_share_of_first_token, cache.storing_s
    return "" if share is None or seconds is None else f"{seconds:.3f} ({100 * share:.1f} %)"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _times(rows: int) -> str:
    return "" if rows == 1 else f"{rows} x "


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _bytes(count: float | None) -> str:
    if count is None:
        return ""
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / _MIB:.1f} MiB"
