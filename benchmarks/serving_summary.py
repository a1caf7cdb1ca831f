"""The figures of `serving.py` over its processes: turns, medians, ratios to the baseline, the lines of a log that matter."""

import re
import statistics
from itertools import chain

BASELINE = "bf16"
_LOGGED = re.compile(
    r"Using .*backend|FlashAttention version|KV cache size|Maximum concurrency|raph captur|ElasticKV:", re.IGNORECASE
)
_PREFIX = re.compile(r"^.*?\b(INFO|WARNING|ERROR) [\d-]+ [\d:]+ \[[^]]*\] ")
_GRAPHS = re.compile(r"Graph capturing finished in .*took (-?[\d.]+) GiB")


def turns(contenders: list[str], rounds: int) -> list[tuple[int, str]]:
    """Return (round, contender) of each process: every second round is reversed, so that drift falls on all of them."""
    return [(number, name) for number in range(rounds) for name in (contenders[::-1] if number % 2 else contenders)]


def summary(processes: list[dict]) -> list[dict]:
    """Return the contenders' figures over all their processes, each with its ratio to the baseline's."""
    names = list(dict.fromkeys(process["contender"] for process in processes))
    return [_figures(name, processes) for name in names]


def _figures(name: str, processes: list[dict]) -> dict:
    own = [process for process in processes if process["contender"] == name and process.get("environment")]
    failures = [f"round {p['round'] + 1}: {p['failed']}" for p in processes if p["contender"] == name and p["failed"]]
    failures += [f"round {p['round'] + 1}: {line}" for p in own for line in p["not_measured"]]
    cells = dict.fromkeys((cell["context"], cell["batch"]) for process in own for cell in process["steps"])
    flash = {p["environment"]["flash_attention"] for p in own}
    return {
        "contender": name,
        "kv_cache_dtype": own[0]["environment"]["kv_cache_dtype"] if own else None,
        "backends": own[0]["environment"]["backends"] if own else [],
        "flash_attention": max(flash - {None}, default=None),
        "steps": [
            {"context": context, "batch": batch}
            | timed(name, processes, step_samples(context, batch), "ms")
            | _reads(own, context, batch)
            for context, batch in cells
        ],
        "capacity": own[0]["capacity"] if own else [],
        "throughput": _throughput(name, processes, own),
        "first_token": _first_token(name, processes, own),
        "startup_s": [process["startup_s"] for process in own],
        "graph_bytes": own[0]["graph_bytes"] if own else None,
        "peak_bytes": max((p["memory"]["peak_bytes"] for p in own if p.get("memory")), default=None),
        "failures": failures,
    }


def step_samples(context, batch):
    """Return a function that takes the samples of a cell from a process."""

    def samples(process):
        cells = [cell for cell in process["steps"] if (cell["context"], cell["batch"]) == (context, batch)]
        return cells[0]["samples_ms"] if cells else []

    return samples


def _reads(own, context, batch):
    """Return what decodes of a cell read, all processes together; nothing where none counted it."""
    cells = [cell for process in own for cell in process["steps"] if (cell["context"], cell["batch"]) == (context, batch)]
    counted = [cell["reads"] for cell in cells if cell.get("reads")]
    return {"reads": {name: sum(reads[name] for reads in counted) for name in counted[0]}} if counted else {}


def _tokens_per_s(process):
    at_capacity = process["throughput"]
    return [at_capacity["requests"] / ms * 1e3 for ms in at_capacity["samples_ms"]] if at_capacity else []


def _first_token_s(process):
    return process["first_token"]["samples_s"] if process["first_token"] else []


def _throughput(name, processes, own):
    measured = [process["throughput"] for process in own if process["throughput"]]
    if not measured:
        return None
    requests = [one["requests"] for one in measured]
    step_ms = [ms for one in measured for ms in one["samples_ms"]]
    steps = {"context": measured[0]["context"], "requests": min(requests), "step_ms": statistics.median(step_ms)}
    return steps | timed(name, processes, _tokens_per_s, "tokens_per_s")


def _first_token(name, processes, own):
    measured = [process["first_token"] for process in own if process["first_token"]]
    return {"context": measured[0]["context"]} | timed(name, processes, _first_token_s, "s") if measured else None


def timed(name: str, processes: list[dict], samples_of, unit: str) -> dict:
    """Return the median of all samples, the samples of each round, and the ratio to the baseline's median.

    The ratio's bounds are the least and the greatest of the ratios of single rounds.
    """
    rounds: dict[str, dict[int, list[float]]] = {name: {}, BASELINE: {}}
    for process in processes:
        if process["contender"] in rounds and process.get("environment") and (samples := samples_of(process)):
            rounds[process["contender"]][process["round"]] = samples
    own, base = rounds[name], rounds[BASELINE]
    medians = {number: statistics.median(samples) for number, samples in own.items()}
    ratio = None
    if base and name != BASELINE:
        ratios = [median / statistics.median(base[number]) for number, median in medians.items() if number in base]
        whole = _median(own) / _median(base)
        ratio = {"estimate": whole, "low": min([whole, *ratios]), "high": max([whole, *ratios])}
    return {unit: _median(own), "samples": list(own.values()), "of_baseline": ratio}


def _median(rounds: dict[int, list[float]]) -> float:
    return statistics.median(chain.from_iterable(rounds.values()))


def device_of(processes: list[dict]) -> dict:
    """Return what the processes ran on, as the first engine that started says."""
    started = next((process["environment"] for process in processes if process.get("environment")), {})
    return {name: started.get(name) for name in ("device", "driver", "vllm", "torch")}


def line(process: dict) -> str:
    """Return what a process came to."""
    name = f"{process['contender']} (round {process['round'] + 1})"
    parts = [f"failed: {process['failed']}"] if process["failed"] else []
    if process.get("environment"):
        used = process["environment"]
        flash = f", FlashAttention {used['flash_attention']}" if used["flash_attention"] else ""
        parts.append(f"{'+'.join(used['backend_names'])}{flash}, started in {process['startup_s']:.0f} s")
        parts += [
            f"{cell['context']}x{cell['batch']} {statistics.median(cell['samples_ms']):.3f} ms" for cell in process["steps"]
        ]
        if tokens := _tokens_per_s(process):
            at_capacity = process["throughput"]
            parts.append(f"{at_capacity['requests']} x {at_capacity['context']}: {statistics.median(tokens):.0f} tokens/s")
        if seconds := _first_token_s(process):
            parts.append(f"first token {statistics.median(seconds):.2f} s")
        parts += [f"capacity at {row['context']}: {row['tokens']:.0f} tokens" for row in process["capacity"]]
        parts += process["not_measured"]
    return f"{name}: {'; '.join(parts)} ({process['seconds']:.0f} s)"


def telling_line(text: str) -> str:
    """Return the last line that names an error, or the last line."""
    lines = list(filter(None, map(_message, text.splitlines())))
    errors = [line for line in lines if "Error" in line.split(":")[0] and not line.startswith("File ")]
    return (errors or lines or ["nothing was said"])[-1]


def logged(text: str) -> list[str]:
    """Return what vLLM logs of its backend, its cache and its graphs, once each."""
    return list(dict.fromkeys(_message(line) for line in text.splitlines() if _LOGGED.search(line)))


def _message(line: str) -> str:
    """Return a line of vLLM's log without the time and the file that it begins with."""
    return _PREFIX.sub("", line).strip()


def graph_bytes(lines: list[str]) -> float | None:
    """Return the bytes that vLLM says its CUDA graphs took; None where it captured none."""
    sizes = [match[1] for match in map(_GRAPHS.search, lines) if match]
    return max(0.0, float(sizes[-1])) * 2**30 if sizes else None
