"""The tables of docs/vllm.md, from results of two scripts: speed and capacity (`serving.py`), quality (`first_page.py`)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elastickv.results.kinds.serving_result import (
    RatioOfRounds,
    ServingContender,
    ServingFirstToken,
    ServingResult,
    ServingThroughput,
)

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
SERVING = "h200/serving.json"
QUALITY = "cpu/first_page-*.json"
AS_SERVED = "as all pages"  # the variant of the study that is what the engine does


def serving() -> list[str]:
    """Return a table with a column for each contender; a sentence where nothing has been measured yet."""
    path = RESULTS / SERVING
    if not path.exists():
        return ["Not measured yet."]
    record = json.loads(path.read_text(encoding="utf-8"))
    result = ServingResult.from_dict(record, SERVING)
    contenders = result.contenders
    rows = [*_step_rows(contenders), *_first_token_row(contenders), *_throughput_rows(contenders)]
    rows += [*_capacity_rows(result), *_start_rows(contenders)]
    headers = ["", *(f"`{each.contender}`" for each in contenders)]
    return [_source(result), "", *_table(headers, rows), "", NOTE, *_start_line(record), *_not_measured(result)]


NOTE = (
    "In brackets: the ratio to bf16, with the least and the greatest ratio of a round. A step is a decode step of all requests "
    "together. Capacity: the tokens that the same memory holds in requests of that context."
)


def serving_quality() -> list[str]:
    """Return what reading by the engine's rule costs predictions, a row for each model, format and window."""
    headers = ["model", "format", "window", "KL, nats/token", "PPL change %", "top-1 %", "scored tokens"]
    rows = []
    for path in sorted(RESULTS.glob(QUALITY)):
        record = json.loads(path.read_text(encoding="utf-8"))
        scored = len(record["windows"]) * record["scored_tokens_of_a_window"]
        for cell in record["cells"]:
            if cell["first_page"] == AS_SERVED:
                figures = (
                    _estimate(cell["kl"], 4),
                    _estimate(cell["ppl_change_percent"], 2),
                    _estimate(cell["top1_percent"], 1),
                )
                rows.append([record["model"], f"`{cell['format']}`", str(cell["exact_tokens"]), *figures, str(scored)])
    return _table(headers, rows) if rows else ["Not measured yet."]


def _table(headers: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers), *("| " + " | ".join(row) + " |" for row in rows)]


def _estimate(figure: dict[str, float], digits: int) -> str:
    return f"{figure['mean']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def _source(result: ServingResult) -> str:
    device, environment = result.device, result.environment
    driver = f", driver {device.driver}" if device.driver else ""
    flash = next((each.flash_attention for each in result.contenders if each.contender == result.baseline), None)
    version = f", {result.baseline} with FlashAttention {flash}" if flash else ""
    return (
        f"`{result.model}`, {result.weights} weights, on {device.device}{driver}; vllm {device.vllm}, torch {device.torch}"
        f"{version}; {str(environment['date_utc'])[:10]}, commit {str(environment['commit'])[:7]}."
    )


def _ratio(ratio: RatioOfRounds | None) -> str:
    return "" if ratio is None else f" ({ratio.estimate:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}])"


def _step_rows(contenders: Sequence[ServingContender]) -> list[list[str]]:
    steps = [{(step.context, step.batch): step for step in each.steps} for each in contenders]
    return [
        [
            f"step of {batch} x {context}, ms",
            *(
                f"{each[context, batch].ms:.2f}{_ratio(each[context, batch].of_baseline)}" if (context, batch) in each else "-"
                for each in steps
            ),
        ]
        for context, batch in dict.fromkeys(cell for each in steps for cell in each)
    ]


def _first_token_row(contenders: Sequence[ServingContender]) -> list[list[str]]:
    measured = [each.first_token for each in contenders]

    def cell(one: ServingFirstToken | None) -> str:
        return "-" if one is None else f"{one.s:.2f}{_ratio(one.of_baseline)}"

    contexts = dict.fromkeys(one.context for one in measured if one)
    return [[f"first token of a prompt of {context}, s", *map(cell, measured)] for context in contexts]


def _throughput_rows(contenders: Sequence[ServingContender]) -> list[list[str]]:
    measured = [each.throughput for each in contenders]

    def cell(one: ServingThroughput | None) -> str:
        return "-" if one is None else f"{one.tokens_per_s:.0f}{_ratio(one.of_baseline)}"

    rows = []
    for context in dict.fromkeys(one.context for one in measured if one):
        rows.append([f"tokens/s with as many requests of {context} as fit", *map(cell, measured)])
        rows.append(["those requests", *("-" if one is None else str(one.requests) for one in measured)])
    return rows


def _capacity_rows(result: ServingResult) -> list[list[str]]:
    tokens = {each.contender: {row.context: row.tokens for row in each.capacity} for each in result.contenders}
    base: Mapping[int, float] = tokens.get(result.baseline, {})

    def cell(name: str, context: int) -> str:
        own = tokens[name].get(context)
        if own is None:
            return "-"
        ratio = f" ({own / base[context]:.2f}x)" if name != result.baseline and context in base else ""
        return f"{own:,.0f}{ratio}"

    contexts = dict.fromkeys(context for each in tokens.values() for context in each)
    return [[f"capacity in requests of {context}, tokens", *(cell(name, context) for name in tokens)] for context in contexts]


def _start_rows(contenders: Sequence[ServingContender]) -> list[list[str]]:
    starts = [f"{min(each.startup_s):.0f}" if each.startup_s else "-" for each in contenders]
    graphs = ["-" if each.graph_bytes is None else f"{each.graph_bytes / 2**20:.0f}" for each in contenders]
    return [["start, s", *starts], ["CUDA graphs, MiB", *graphs]]


def _start_line(record: dict[str, Any]) -> list[str]:
    """Return the line that the backend logs at its start, as a code block."""
    for process in record["processes"]:
        for line in process.get("log", ()):
            if "ElasticKV: page" in line:
                return ["", "The line at the start of that run:", "", "```text", line, "```"]
    return []


def _not_measured(result: ServingResult) -> list[str]:
    lines = [f"- `{each.contender}`, {failure}" for each in result.contenders for failure in each.failures]
    lines += [f"- {each}" for each in result.dropped]
    return ["", "Not measured:", "", *lines] if lines else []
