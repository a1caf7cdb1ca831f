"""What generated text took, as text: of `elastickv run` and `elastickv bench --model`."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from elastickv.benchmark.stats.intervals import Interval
from elastickv.errors import printable
from elastickv.results.formats.html import html_paragraphs, html_table
from elastickv.results.formats.rows import as_json, as_jsonl, csv_of, markdown_of
from elastickv.results.formats.units import NO_INTERVAL, ratio_sentence, with_bounds
from elastickv.results.kinds.model_result import (
    ELASTIC,
    CacheRecord,
    CompressionStart,
    ModelBenchResult,
    PromptTokens,
    RunResult,
    device_name,
)
from elastickv.results.speed_ratios import model_ratios

_GIB, _MIB = 1 << 30, 1 << 20
_COLUMNS = (
    "cache", "tokens_per_s", "median_step_ms", "floor_ms", "first_token_s", "read_ratio", "stored_ratio", "held_ratio",
    "held_bytes", "peak_bytes",
)  # fmt: skip

Figure = Callable[[CacheRecord], str]
# Of a benchmark alone, which compares a step with what the memory bandwidth allows.
_STEP: tuple[tuple[str, Figure], ...] = (
    ("ms a step", lambda c: _number(c.tokens_per_s and 1e3 * c.rows / c.tokens_per_s, 2)),
    ("  interval", lambda c: span_of(c.step_ms, "{:.2f}")),
    ("  floor: weights + KV, once", lambda c: _number(c.floor_ms, 2)),
    ("  x of the floor", lambda c: _number(c.of_floor, 2)),
)
_OF_MODEL = ("model_stored_ratio", "model_held_ratio")


def generation_table(result: RunResult | ModelBenchResult) -> str:
    """Return a column for each cache that was measured, then the speed-up and what was not run."""
    lines = [_heading(result), *columns(_grid(result)), *_sentences(result)]
    return "".join(printable(line, keep="") + "\n" for line in lines)


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows as lines of aligned cells, the first column to the left, the others to the right."""
    shown = [[printable(cell, keep="") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def bounds_of(figure: Interval | None) -> tuple[float, float] | tuple[None, None]:
    """Return the bounds of a figure; None where too few samples make none."""
    return (None, None) if figure is None or not figure.is_shown else (figure.low, figure.high)


def span_of(figure: Interval | None, form: str) -> str:
    """Return the bounds of a time as text; a word where too few samples make none."""
    low, high = bounds_of(figure)
    return "none" if low is None else f"{form.format(low)}..{form.format(high)}"


def compression_sentence(starts: CompressionStart, compress: float | None) -> str:
    """Return from which contexts a run compresses."""
    if starts.reads_less_from is None:
        return "nothing is compressed at any context"
    begins = f"decodes read less than a dense cache from {starts.reads_less_from} tokens of context on"
    if starts.ratio_from is not None:
        return f"{begins}, at most 1/{compress:g} from {starts.ratio_from} on"
    return begins if compress is None else f"{begins}, and nowhere as little as 1/{compress:g}"


def prompt_lines(prompt: PromptTokens | None) -> list[str]:
    """Return how the prompts of a benchmark begin, and the hash of their tokens; nothing for files without them."""
    if prompt is None:
        return []
    special = f"special token {', '.join(map(str, prompt.prefix))}" if prompt.prefix else "no special token"
    return [f"prompt: begins with {special}, tokens {prompt.hash}"]


def as_html(result: RunResult | ModelBenchResult) -> str:
    """Return the same for a notebook."""
    headers, *cells = _grid(result)
    return html_paragraphs([_heading(result)]) + html_table(headers, cells, _sentences(result))


def rows(result: RunResult | ModelBenchResult) -> list[dict[str, Any]]:
    """Return the main figures of a model's decode, a row for each cache; None where there is none."""
    options = {name: getattr(result, name, None) for name in ("context", "batch", "compress", "recipe", "calibrated")}
    of_model = [name for name in _OF_MODEL if any(getattr(cache, name) is not None for cache in result.caches)]
    common = {"model": result.model.name, "dtype": result.model.dtype, "device": result.device} | options
    if isinstance(result, RunResult):
        own = next((cache for cache in result.caches if cache.cache == ELASTIC), None)
        common |= {"context": own.prompt_tokens, "batch": own.rows, "calibrated": own.calibrated} if own else {}
    ratios = model_ratios(result)
    return [
        common
        | {name: getattr(cache, name) for name in (*_COLUMNS, *of_model)}
        | dict(zip(("step_ms_low", "step_ms_high"), bounds_of(cache.step_ms), strict=True))
        | {f"speedup_{bound}": getattr(ratios.get(cache.cache), bound, None) for bound in ("estimate", "low", "high")}
        for cache in result.caches
    ]


def _markdown(result: RunResult | ModelBenchResult) -> str:
    return markdown_of(rows(result))


def _csv(result: RunResult | ModelBenchResult) -> str:
    return csv_of(rows(result))


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
    # The bytes read are of all layers, their ratio is of the elastic ones: the same only without other layers.
    hybrid = any(cache.model_stored_ratio is not None for cache in result.caches)
    lines: list[tuple[str, Figure]] = [
        ("tokens/s", lambda c: _number(c.tokens_per_s, 2)),
        *(_STEP if bench else ()),
        ("first token, s", lambda c: _number(c.first_token_s, 3)),
        ("  of it storing", _storing),
        ("tokens: prompt + new", lambda c: f"{_times(c.rows)}{c.prompt_tokens} + {c.new_tokens}"),
        ("decodes captured", lambda c: _percent(c.captured_share)),
        ("decodes launched speculatively", lambda c: _percent(c.ahead_share)),
        ("KV read", lambda c: _bytes(c.kv_read_bytes)),
        ("  1/C of 16 bit" + (", elastic layers" if hybrid else ""), lambda c: _ratio(c.read_ratio)),
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
    lines = [ratio_sentence(ratio) for ratio in model_ratios(result).values()]
    if result.noise_floor:
        lines.append(f"noise floor: {with_bounds(result.noise_floor)}")
    lines += [sentence for cache in result.caches if (sentence := _layers_by_keys(cache))]
    if not isinstance(result, ModelBenchResult):
        return lines if result.compression is None else [*lines, compression_sentence(result.compression, result.compress)]
    if any(cache.step_ms is None or not cache.step_ms.is_shown for cache in result.caches):
        lines.append(f"ms a step: {NO_INTERVAL}")
    lines += prompt_lines(result.prompt)
    lines += [f"beware: {flag}" for flag in result.host_flags]
    return [*lines, *(f"not run: {name}: {reason}" for name, reason in result.not_run.items())]


def _layers_by_keys(cache: CacheRecord) -> str | None:
    """Return the layers with other recipes than most; None with a calibration, which gives each layer its own."""
    recipes = cache.recipes or {}
    if cache.calibrated or len(set(recipes.values())) < 2:
        return None
    usual = Counter(recipes.values()).most_common(1)[0][0]
    others: dict[str, list[str]] = {}
    for layer, recipe in recipes.items():
        if recipe != usual:
            others.setdefault(recipe, []).append(layer)
    return f"recipe {usual}; " + "; ".join(f"{recipe} in layers {', '.join(layers)}" for recipe, layers in others.items())


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
