"""Does `compare` tell the truth on a real machine? Two sweeps of the same code, and one whose elastic contender is slower.

    python benchmarks/compare_study.py --output benchmarks/results/cpu/compare_study.json

Every cell is measured by `elastickv.benchmark` for each of the three in turns, prepared anew each time; of the third the
elastic contender takes 10 % longer a sample (it spins). B against A should be SAME in 95 % of the cells, the third SLOWER in
95 %. On a machine that does other work the answer is AMBIGUOUS: what it must not be is SLOWER for the same code.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from command_line import exit_with

from elastickv.benchmark import Options, prepare, run
from elastickv.benchmark.environment import environment
from elastickv.results.compare.comparison import Comparison, compare
from elastickv.results.formats.plain_json import dumps

SEQUENCES, HEADS, RECIPES = (1024, 1536, 2048, 3072, 4096), (8, 16), ("int8", "int4")
SHOWN = ("cell", "verdict", "a_ms", "b_ms", "dense_ratio", "ratio", "ratio_low", "ratio_high", "control")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--cells", type=int, default=20, help="at most, of 20")
    parser.add_argument("--rounds", type=int, default=4, help="runs of each cell and sweep; from 3 on their own spread counts")
    parser.add_argument("--reps", type=int, default=100)
    parser.add_argument("--time-limit", type=float, default=15.0, help="seconds to a cell and sweep")
    parser.add_argument("--slowdown", type=float, default=1.1)
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds after which no cell begins")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    # The longest first: of them a machine's noise is the smallest part.
    cells = list(product(SEQUENCES[::-1], HEADS[::-1], RECIPES))[: arguments.cells]
    start = time.monotonic()
    sweeps: dict[str, list[dict[str, Any]]] = {"a": [], "b": [], "slower": []}
    for round_, (seq, heads, recipe) in product(range(arguments.rounds), cells):
        if time.monotonic() - start > arguments.stop_after:
            break
        options = Options(
            seq=seq,
            heads=heads,
            compress=1.0,
            recipe=recipe,
            reps=arguments.reps,
            warmup=5,
            paired=True,
            time_limit_s=arguments.time_limit,
            dense="bf16",
            backend=arguments.backend,
            seed=round_,
        )
        for name in random.Random(round_).sample(list(sweeps), len(sweeps)):
            sweeps[name].append(measured(options, arguments.slowdown if name == "slower" else 1.0))
            print(f"round {round_ + 1}: {seq} x {heads}, {recipe}: {name}", flush=True)
    same, slower = compare(sweeps["a"], sweeps["b"]), compare(sweeps["a"], sweeps["slower"])
    record = {
        "what": "A against B: the same code; A against slower: elastic samples take longer by the slowdown",
        "device": sweeps["a"][0]["gpu"]["name"],
        "environment": environment(),
        "cells": len(same.rows),
        "runs_of_each_sweep": len(sweeps["a"]),
        "reps": arguments.reps,
        "slowdown": arguments.slowdown,
        "same": summary(same),
        "slower": summary(slower),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(dumps(record), encoding="utf-8")
    print(f"the same code: {same.counts()['SAME']} of {len(same.rows)} SAME", json.dumps(same.counts()))
    print(
        f"{arguments.slowdown:g} x slower: {slower.counts()['SLOWER']} of {len(slower.rows)} SLOWER",
        json.dumps(slower.counts()),
    )


def measured(options: Options, slowdown: float) -> dict[str, Any]:
    """Return a result in whose run the elastic contender takes `slowdown` times as long."""
    ours = prepare.ours

    def slowed(name: str, *rest: Any) -> Any:
        contender, program, caches = ours(name, *rest)
        if name == "elastic" and slowdown > 1:
            contender = replace(contender, sample=spinning(contender.sample, slowdown))
        return contender, program, caches

    prepare.ours = slowed
    try:
        return run(options).as_dict()
    finally:
        prepare.ours = ours


def spinning(sample: Callable[[], float], slowdown: float) -> Callable[[], float]:
    def taken() -> float:
        start = time.perf_counter()
        step_ms = sample()
        elapsed = time.perf_counter() - start
        while time.perf_counter() - start < slowdown * elapsed:
            pass
        return step_ms * (time.perf_counter() - start) / elapsed

    return taken


def summary(comparison: Comparison) -> dict[str, Any]:
    from elastickv.results.compare.comparison_table import flat

    rows = [{name: flat(row)[name] for name in SHOWN} for row in comparison.rows]
    return {"counts": comparison.counts(), "warnings": comparison.warnings, "rows": rows}


if __name__ == "__main__":
    exit_with(main)
