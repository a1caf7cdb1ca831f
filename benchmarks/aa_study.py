"""Does the interval tell the truth about nothing? Repeated A/A comparisons: dense against itself, in mirrored blocks.

    python benchmarks/aa_study.py --output benchmarks/results/cpu/aa_study.json

In 60 comparisons a 95 % interval should contain 1.0 at least 53 times (binomial, 97.5 % of the time).
"""

import argparse
import json
from pathlib import Path

from elastickv.backends import load
from elastickv.measure.contenders import ours, plan_rotation
from elastickv.measure.environment import environment
from elastickv.measure.sampler import collect
from elastickv.measure.statistics import ratio_interval
from elastickv.recipe import DENSE, AttentionShape, step_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--comparisons", type=int, default=60)
    parser.add_argument("--reps", type=int, default=40)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    backend, _ = load(arguments.backend)
    shape, context = AttentionShape(1, 16, 16, 64), 1024
    kv_bytes = step_bytes(DENSE, [context], shape).kv
    rotation = plan_rotation(kv_bytes, 64, 1, backend.device.last_level_cache_bytes, True, 512)
    contender, _, _ = ours("dense-bf16", backend, shape, context, "bf16", DENSE, rotation, 0, True)
    timed = {"a": contender.sample, "b": contender.sample}
    collect(timed, 5, paired=True)
    intervals = []
    for comparison in range(arguments.comparisons):
        samples = collect(timed, arguments.reps, paired=True, seed=comparison)
        interval = ratio_interval(samples.times["a"], samples.times["b"])
        intervals.append({"estimate": interval.estimate, "low": interval.low, "high": interval.high})
    contained = sum(i["low"] <= 1 <= i["high"] for i in intervals)
    faster = sum(i["low"] > 1 for i in intervals)
    record = {
        "what": "A/A: dense-bf16 against itself, 1024x16x64, cold, 64 steps a sample",
        "device": backend.device.name,
        "driver": backend.device.driver,
        "environment": environment(),
        "comparisons": arguments.comparisons,
        "reps": arguments.reps,
        "contained_1": contained,
        "false_faster": faster,
        "intervals": intervals,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{contained} of {arguments.comparisons} intervals contain 1.0; {faster} falsely say faster")


if __name__ == "__main__":
    main()
