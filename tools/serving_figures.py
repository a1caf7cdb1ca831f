"""The tables of docs/vllm.md, from results of two scripts: speed and capacity (`serving.py`), quality (`first_page.py`)."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
SERVING = "h200/serving.json"
QUALITY = "cpu/first_page-*.json"
AS_SERVED = "as all pages"  # the variant of the study that is what the engine does
Cell = tuple[int, int]


def serving() -> list[str]:
    """Return a table with a column for each contender; a sentence where nothing has been measured yet."""
    path = RESULTS / SERVING
    if not path.exists():
        return ["Not measured yet."]
    record = json.loads(path.read_text(encoding="utf-8"))
    contenders = record["contenders"]
    rows = [*_step_rows(contenders), *_first_token_row(contenders), *_throughput_row(contenders)]
    rows += [*_capacity_rows(contenders, record["baseline"]), *_start_rows(contenders)]
    headers = ["", *(f"`{each['contender']}`" for each in contenders)]
    return [_source(record), "", *_table(headers, rows), "", NOTE, *_start_line(record), *_failures(contenders)]


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


def _source(record: dict[str, Any]) -> str:
    device = record["device"]
    backends = sorted({name.rpartition(".")[2] for each in record["contenders"] for name in each["backends"]})
    flash = next((each["flash_attention"] for each in record["contenders"] if each["contender"] == record["baseline"]), None)
    model = f"`{record['model']}`, {record['weights']} weights"
    driver = f", driver {device['driver']}" if device["driver"] else ""
    version = f", FlashAttention {flash} for bf16" if flash else ""
    return (
        f"{model}, on {device['device']}{driver}; vllm {device['vllm']}, torch {device['torch']}{version}; "
        f"{', '.join(backends)}; {record['environment']['date_utc'][:10]}, commit {str(record['environment']['commit'])[:7]}."
    )


def _ratio(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f" ({ratio['estimate']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}])"


def _step_rows(contenders: list[dict[str, Any]]) -> list[list[str]]:
    steps = [{(step["context"], step["batch"]): step for step in each["steps"]} for each in contenders]
    cells: dict[Cell, None] = dict.fromkeys(cell for each in steps for cell in each)
    return [
        [
            f"step of {batch} x {context}, ms",
            *(f"{each[cell]['ms']:.2f}{_ratio(each[cell]['of_baseline'])}" if cell in each else "-" for each in steps),
        ]
        for cell in cells
        for context, batch in (cell,)
    ]


def _timed_row(contenders: list[dict[str, Any]], key: str, unit: str, digits: int, label: str) -> list[list[str]]:
    measured = [each[key] for each in contenders]
    first = next(filter(None, measured), None)
    if first is None:
        return []
    values = [f"{one[unit]:.{digits}f}{_ratio(one['of_baseline'])}" if one else "-" for one in measured]
    return [[label.format(**first), *values]]


def _first_token_row(contenders: list[dict[str, Any]]) -> list[list[str]]:
    return _timed_row(contenders, "first_token", "s", 2, "first token of a prompt of {context}, s")


def _throughput_row(contenders: list[dict[str, Any]]) -> list[list[str]]:
    rows = _timed_row(contenders, "throughput", "tokens_per_s", 0, "tokens/s with as many requests of {context} as fit")
    if rows:
        rows.append(
            ["those requests", *(str(each["throughput"]["requests"]) if each["throughput"] else "-" for each in contenders)]
        )
    return rows


def _capacity_rows(contenders: list[dict[str, Any]], baseline: str) -> list[list[str]]:
    capacities = [{row["context"]: row["tokens"] for row in each["capacity"]} for each in contenders]
    base: dict[int, float] = next(
        (tokens for each, tokens in zip(contenders, capacities, strict=True) if each["contender"] == baseline), {}
    )
    rows = []
    for context in dict.fromkeys(context for each in capacities for context in each):
        row = [f"capacity in requests of {context}, tokens"]
        for tokens in capacities:
            ratio = (
                f" ({tokens[context] / base[context]:.2f}x)"
                if context in base and tokens is not base and context in tokens
                else ""
            )
            row.append(f"{tokens[context]:,.0f}{ratio}" if context in tokens else "-")
        rows.append(row)
    return rows


def _start_rows(contenders: list[dict[str, Any]]) -> list[list[str]]:
    starts = [f"{min(each['startup_s']):.0f}" if each["startup_s"] else "-" for each in contenders]
    graphs = ["-" if each["graph_bytes"] is None else f"{each['graph_bytes'] / 2**20:.0f}" for each in contenders]
    return [["start, s", *starts], ["CUDA graphs, MiB", *graphs]]


def _start_line(record: dict[str, Any]) -> list[str]:
    """Return the line that the backend logs at its start, as a code block."""
    for process in record["processes"]:
        for line in process.get("log", ()):
            if "page" in line and "window" in line and "capacity" in line:
                return ["", "The line at the start of that run:", "", "```text", line, "```"]
    return []


def _failures(contenders: list[dict[str, Any]]) -> list[str]:
    lines = [f"- `{each['contender']}`, {failure}" for each in contenders for failure in each["failures"]]
    return ["", "Not measured:", "", *lines] if lines else []
