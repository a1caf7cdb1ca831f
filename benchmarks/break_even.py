"""Where fewer bytes are no faster: `auto` against our fastest dense on space-filling cells, each paired.

    python benchmarks/break_even.py --output benchmarks/results/h100/break_even.json [--cells 200] [--time-limit 600]

Cells are drawn with a fixed seed from batch 1..64 x context 1k..256k x query heads to a KV head x head_dim x compress, evenly:
the additive recurrence of Roberts (2018) in five dimensions, which fills space however many of its points are taken. A cell
that does not fit the device, or whose budget cannot be met, is kept with the reason.
"""

import argparse
import json
import math
import time
from datetime import datetime, timezone
from pathlib import Path

from elastickv.backends import load
from elastickv.benchmark.environment import environment
from elastickv.benchmark.options import Options
from elastickv.benchmark.prepare import check_memory, prepare
from elastickv.benchmark.sample_inputs import load_sample
from elastickv.benchmark.sampler import collect
from elastickv.benchmark.stats.intervals import ratio_interval
from elastickv.errors import KernelMismatch, UsageError

GROUPS = (1, 2, 3, 4, 5, 7, 8, 16)
HEAD_DIMS = (64, 80, 96, 128, 256)
RATIOS = (2, 3, 4, 6, 8)
MOST_HEADS = 32  # query heads, about
MOST_BYTES = 8e9  # of dense keys and values


def points(count: int, dimensions: int):
    """Yield points of the unit cube that lie ever closer: multiples of powers of the generalised golden ratio, modulo 1."""
    golden = 2.0
    for _ in range(64):
        golden = (1 + golden) ** (1 / (dimensions + 1))
    for n in range(1, count + 1):
        yield [(0.5 + n * golden ** -(i + 1)) % 1 for i in range(dimensions)]


def cells(count: int):
    for batch, context, group, dim, budget in points(count, 5):
        yield {
            "batch": round(64**batch),
            "seq": round(1024 * 256**context / 32) * 32,
            "group": GROUPS[int(group * len(GROUPS))],
            "dim": HEAD_DIMS[int(dim * len(HEAD_DIMS))],
            "compress": RATIOS[int(budget * len(RATIOS))],
        }


def measure(cell: dict, arguments: argparse.Namespace, sample, backend) -> dict:
    kv_heads = max(1, min(8, MOST_HEADS // cell["group"]))
    size = 4 * cell["batch"] * kv_heads * cell["dim"] * cell["seq"]
    if size > MOST_BYTES:
        # Larger only in time: the shape of the cell stays.
        cell = cell | {"batch": max(1, int(cell["batch"] * MOST_BYTES / size))}
    options = Options(
        seq=cell["seq"],
        batch=cell["batch"],
        heads=kv_heads * cell["group"],
        kv_heads=kv_heads,
        dim=cell["dim"],
        compress=cell["compress"],
        backend=arguments.backend,
        inner_loops=max(1, min(16, math.ceil(2e9 / size))),
    )
    recipe = options.resolved_recipe
    check_memory(backend, options, recipe)
    field = prepare(backend, options, recipe, sample.query_rms, lambda _: None)
    timed = {"dense": field.own_dense.sample, "elastic": field.elastic.sample}
    collect(timed, 2, paired=True, seed=0)
    samples = collect(timed, arguments.reps, paired=True, seed=1)
    gain = ratio_interval(samples.times["dense"], samples.times["elastic"])
    field.elastic.close()
    field.own_dense.close()
    return cell | {
        "kv_heads": kv_heads,
        "solved": str(recipe),
        "used": str(field.recipe),
        "fallback": field.fallback,
        "gain": {"estimate": gain.estimate, "low": gain.low, "high": gain.high},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--reps", type=int, default=12)
    parser.add_argument("--time-limit", type=float, default=600.0, help="seconds for all cells")
    parser.add_argument("--backend", default="auto")
    arguments = parser.parse_args()
    start, sample, backend = time.monotonic(), load_sample(), load(arguments.backend)[0]
    rows: list[dict] = []
    for cell in cells(arguments.cells):
        if time.monotonic() - start > arguments.time_limit:
            break
        try:
            rows.append(measure(cell, arguments, sample, backend))
        except (UsageError, KernelMismatch) as error:
            rows.append(cell | {"not_run": str(error)[:300]})
        print(rows[-1], flush=True)
    measured = [row for row in rows if "gain" in row]
    slower = [row for row in measured if row["gain"]["high"] < 0.97]
    result = {
        "date_utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": backend.device.name,
        "driver": backend.device.driver,
        "environment": environment(),
        "cells_asked": arguments.cells,
        "cells_measured": len(measured),
        "fell_back": sum(row["fallback"] is not None for row in measured),
        "slower_by_more_than_3_percent": len(slower),
        "least_gain": min((row["gain"]["estimate"] for row in measured), default=None),
        "cells": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{len(measured)} cells, {result['fell_back']} fell back, {len(slower)} slower, least gain {result['least_gain']}")


if __name__ == "__main__":
    from command_line import exit_with

    exit_with(main)
