"""Replays and a soak: no answer differs, no long run drifts, no memory grows.

    python benchmarks/soak.py --output benchmarks/results/reliability/soak.json [--steps 200000] [--replays 10000]

Replays: one captured decode step, launched again and again from the same state; every output is compared, bit by bit, with the
first. Soak: captured tokens of an inference cycle through four layers, in legs: each starts anew with sequences of random,
ragged lengths and grows them. After every leg the outputs of the last captured token are checked against the float64 oracle of
the same codes and pages, and the free bytes of the device and this process's resident bytes are noted.
"""

import argparse
import json
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from command_line import exit_with

from elastickv.backends import load
from elastickv.backends.feedback import Feedback
from elastickv.benchmark.environment import environment
from elastickv.kvcache import Oracle
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.recipe import AttentionShape, Recipe

SHAPE = AttentionShape(2, 8, 2, 128)
RECIPES = ("dense", "int8", "fp8", "k=int8,v=int4", "int4", "int4,pages=1/4,anchor_every=4")
LAYERS = 4
LONGEST = 3000  # tokens that a leg may begin with
LEG = 500  # tokens that it grows by
KERNEL_ERROR = 4e-3  # operands of 16 bits
WARM_LEGS = 2  # what is allocated once is allocated by then


def replays(backend, dtype: str, text: str, count: int) -> dict:
    """Launch one captured step `count` times."""
    cache = backend.cache(SHAPE, LONGEST + 1, dtype, Recipe.parse(text))
    cache.fill_random(np.array([LONGEST, LONGEST - 777]), 1)
    queries = np.random.default_rng(2).standard_normal((SHAPE.batch, SHAPE.query_heads, SHAPE.head_dim), dtype=np.float32)
    cache.mark()
    program = backend.attention([cache], [queries], 1, True)
    first, differing = None, 0
    for _ in range(count):
        program.reset()
        program.run(1)
        output = program.outputs()[0]
        first = output if first is None else first
        differing += output.tobytes() != first.tobytes()
    return {"recipe": text, "captured": program.captured, "replays": count, "differing": differing}


def soak(backend, dtype: str, text: str, steps: int) -> dict:
    """Decode `steps` captured tokens, in legs."""
    recipe = Recipe.parse(text)
    caches = [backend.cache(SHAPE, LONGEST + LEG, dtype, recipe, recipe.layer_anchor_offset(i, LAYERS)) for i in range(LAYERS)]
    rng, feedback = np.random.default_rng(3), Feedback.seeded(SHAPE.head_dim, 4, 1.0, 1.0, 1.0)
    first = rng.standard_normal((SHAPE.batch, SHAPE.query_heads, SHAPE.head_dim), dtype=np.float32)
    for cache in caches:
        cache.fill_random(np.full(SHAPE.batch, LONGEST), 0)
    program = backend.cycle(caches, first, feedback, True)
    errors, free, resident, done = [], [], [], 0
    while done < steps:
        lengths = rng.integers(1, LONGEST + 1, SHAPE.batch)
        for layer, cache in enumerate(caches):
            cache.fill_random(lengths, done + layer)
            cache.mark()
        program.reset()
        tokens = min(LEG, steps - done)
        program.run(tokens)
        done += tokens
        outputs = program.outputs()
        for below, output, cache in zip(outputs[:-1], outputs[1:], caches[1:], strict=True):
            queries = feedback(below, SHAPE.group)[0]
            errors.append(float(relative_l2(output, Oracle(cache).decode(queries)[0]).max()))
            cache.raise_non_finite()
        if caches[0].lengths.tolist() != (lengths + tokens).tolist():
            raise SystemExit(f"{text}: the sequences hold {caches[0].lengths}, {lengths + tokens} were expected")
        free.append(backend.device.free_bytes)
        resident.append(resident_bytes())
    growth = [max(series[WARM_LEGS:], default=0) - min(series[WARM_LEGS:], default=0) for series in (free, resident)]
    return {
        "recipe": text,
        "captured": program.captured,
        "steps": done,
        "legs": len(free),
        "layers": LAYERS,
        "checked_outputs": len(errors),
        "largest_error": max(errors),
        "allowed_error": KERNEL_ERROR,
        "free_bytes_spread": growth[0],
        "resident_bytes_spread": growth[1],
    }


def resident_bytes() -> int:
    """Return this process's resident bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200_000, help="captured tokens, over all recipes")
    parser.add_argument("--replays", type=int, default=10_000, help="of each recipe's step")
    arguments = parser.parse_args()
    start, (backend, _) = time.monotonic(), load(arguments.backend)
    dtype = "fp32" if backend.name == "cpu" else "bf16"
    each = -(-arguments.steps // len(RECIPES))
    result = {
        "date_utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": backend.device.name,
        "driver": backend.device.driver,
        "command": f"python benchmarks/soak.py --steps {arguments.steps} --replays {arguments.replays}",
        "replays": [replays(backend, dtype, text, arguments.replays) for text in RECIPES],
        "soak": [soak(backend, dtype, text, each) for text in RECIPES],
        "environment": environment(),
        "seconds": round(time.monotonic() - start, 1),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in (*result["replays"], *result["soak"]):
        print(row, flush=True)
    if any(row["differing"] for row in result["replays"]):
        raise SystemExit("a replayed step gave other bits")
    if any(row["largest_error"] > KERNEL_ERROR for row in result["soak"]):
        raise SystemExit("a captured output is not what its cache says")


if __name__ == "__main__":
    exit_with(main)
