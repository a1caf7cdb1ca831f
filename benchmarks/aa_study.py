"""Does the interval tell the truth about nothing? Repeated A/A comparisons: dense against itself, in mirrored blocks.

    python benchmarks/aa_study.py --output benchmarks/results/cpu/aa_study.json
    python benchmarks/aa_study.py --backend cuda --comparisons 400 --time-limit 40 --output H100.json

Three contenders as in a result, all of them the same dense kernel: what is told of the second must be that it is as fast. Of
95 % intervals 93 to 97 % should contain 1, at most 2.5 % lie above it, and "faster", which a result says beyond the noise floor
only, should be rarer still; the file gives the standard error of such a share, and what telemetry saw.
"""

import argparse
import json
import math
import time
from datetime import datetime, timezone
from pathlib import Path

from command_line import exit_with

from elastickv.backends import load
from elastickv.benchmark.contenders import ours, plan_rotation
from elastickv.benchmark.environment import environment
from elastickv.benchmark.sampler import collect
from elastickv.benchmark.stats.changepoint import find_changepoint
from elastickv.benchmark.stats.intervals import LEVEL, beyond_noise, ratio_interval
from elastickv.benchmark.summary import AA_BASELINE
from elastickv.benchmark.telemetry import Telemetry
from elastickv.recipe import DENSE, AttentionShape, step_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--comparisons", type=int, default=60)
    parser.add_argument("--reps", type=int, default=40)
    parser.add_argument("--steps", type=int, default=64, help="decode steps to a sample")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds after which no other comparison begins")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    backend, _ = load(arguments.backend)
    shape, context = AttentionShape(1, 16, 16, 64), 1024
    kv_bytes = step_bytes(DENSE, [context], shape).kv
    rotation = plan_rotation(kv_bytes, arguments.steps, 1, backend.device.last_level_cache_bytes, True, 512)
    contender, _, _ = ours("dense-bf16", backend, shape, context, "bf16", DENSE, rotation, 0, True)
    timed = dict.fromkeys(("baseline", "elastic", AA_BASELINE), contender.sample)
    collect(timed, 5, paired=True)
    rows = []
    start = time.monotonic()
    with Telemetry(backend.device.kind, 0) as telemetry:
        while len(rows) < arguments.comparisons and time.monotonic() - start < arguments.time_limit:
            samples = collect(
                timed, arguments.reps, paired=True, seed=len(rows), disturbed=lambda: bool(telemetry.snapshot()["flags"])
            )
            interval, floor = (
                ratio_interval(samples.times["baseline"], samples.times[name]) for name in ("elastic", AA_BASELINE)
            )
            rows.append(
                {
                    "estimate": interval.estimate,
                    "low": interval.low,
                    "high": interval.high,
                    "block_length": interval.block_length,
                    "faster": beyond_noise(interval, floor),
                    "changed_speed": find_changepoint(samples.times["baseline"]) is not None,
                    "flagged": len(samples.flagged.get("elastic", [])),
                }
            )
    contender.check()
    count = len(rows)
    record = {
        "what": f"A/A: dense-bf16 against itself, 1024x16x64, cold, {rotation.steps} steps a sample",
        "date_utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": backend.device.name,
        "driver": backend.device.driver,
        "environment": environment(),
        "comparisons": count,
        "reps": arguments.reps,
        "contained_1": sum(row["low"] <= 1 <= row["high"] for row in rows),
        "above_1": sum(row["low"] > 1 for row in rows),
        "below_1": sum(row["high"] < 1 for row in rows),
        "false_faster": sum(row["faster"] for row in rows),
        "standard_error": math.sqrt(LEVEL * (1 - LEVEL) / count),
        "changed_speed": sum(row["changed_speed"] for row in rows),
        "disturbed": telemetry.flags(),
        "intervals": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(
        f"{record['contained_1']} of {count} intervals contain 1.0 ({record['contained_1'] / count:.1%}, standard error "
        f"{record['standard_error']:.1%}), {record['above_1']} lie above, {record['below_1']} below; "
        f'a result would say "faster" of {record["false_faster"]}'
    )
    for line in record["disturbed"]:
        print(line)


if __name__ == "__main__":
    exit_with(main)
