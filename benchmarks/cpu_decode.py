"""Measure the CPU backend against its own dense variants, PyTorch's SDPA and the read ceiling, and write a JSON file.

    python benchmarks/cpu_decode.py --output benchmarks/results/cpu/decode.json

Every contender is launched once a round, in random order, on buffers that rotate past the last-level cache. Figures are
medians; the least time is beside each, because on a shared machine the median also measures its neighbors. Caches of a recipe
with anchors stand at every age, so that a launch is whole anchor intervals, each with its scoring and selecting. A cycle also
maps and appends, for whole anchor intervals and whole pages: every page that leaves the window is quantized within the time.
"""

import argparse
import json
import platform
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from math import ceil, lcm
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from command_line import exit_with

from elastickv.backends import Backend
from elastickv.backends.cpu import open_backend
from elastickv.backends.feedback import Feedback
from elastickv.benchmark.contenders.ours import filled_caches
from elastickv.kvcache import Oracle
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.recipe import DENSE, PAGE_TOKENS, AttentionShape, Recipe, for_ratio, interval_bytes, read_ratio, resolve

FORMATS = ("int8", "int4", "fp8", "k=int8,v=int4", "int4,vgroup=32")
CACHES_EXCEEDED = 3
CEILING_ROUNDS = 5
LEAST_PAGES_RATIO = 8


@dataclass
class Contender:
    """Something that decodes: `launch` runs `steps` steps and returns milliseconds a step."""

    name: str
    group: str
    bytes_per_step: float
    steps: int
    launch: Callable[[], float]
    ratio: float = 1.0
    recipe_hash: str | None = None
    kernel_error: float | None = None
    samples_ms: list[float] = field(default_factory=list)

    @property
    def least_ms(self) -> float:
        """Least time of a step."""
        return min(self.samples_ms)

    @property
    def median_ms(self) -> float:
        """Median time of a step."""
        return median(self.samples_ms)


def copies(n_bytes: float, cold_bytes: int) -> int:
    return max(1, ceil(cold_bytes / n_bytes))


def ours(backend: Backend, shape: AttentionShape, context: int, dtype: str, recipe: Recipe, group: str) -> Contender:
    lengths = [context] * shape.batch
    n_bytes = interval_bytes(recipe, lengths, shape, dtype).kv
    count = copies(n_bytes, CACHES_EXCEEDED * backend.device.last_level_cache_bytes)
    count = ceil(count / recipe.anchor_every) * recipe.anchor_every
    caches = filled_caches(backend, shape, context, dtype, recipe, count, seed=0)
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((len(caches), shape.batch, shape.query_heads, shape.head_dim), dtype=np.float32)
    program = backend.attention(caches, list(queries), len(caches), graph=False)
    program.run()
    error = relative_l2(program.outputs()[0], Oracle(caches[0]).decode(queries[0])[0]).max()
    return Contender(
        f"{dtype} dense" if recipe.is_dense else str(recipe),
        group,
        n_bytes,
        len(caches),
        lambda: program.run()[0] / len(caches),
        read_ratio(recipe, lengths, shape, dtype),
        recipe.hash,
        float(error),
    )


def cycle(backend: Backend, shape: AttentionShape, context: int, dtype: str, recipe: Recipe, group: str) -> Contender:
    lengths = [context] * shape.batch
    n_bytes = interval_bytes(recipe, lengths, shape, dtype).kv
    layers = copies(n_bytes, CACHES_EXCEEDED * backend.device.last_level_cache_bytes)
    tokens = lcm(recipe.anchor_every, PAGE_TOKENS)
    caches = [backend.cache(shape, context + tokens, dtype, recipe) for _ in range(layers)]
    for seed, cache in enumerate(caches):
        cache.fill_random(np.array(lengths), seed)
    rng = np.random.default_rng(0)
    first = rng.standard_normal((shape.batch, shape.query_heads, shape.head_dim), dtype=np.float32)
    program = backend.cycle(caches, first, Feedback.seeded(shape.head_dim, 0, 1.0, 1.0, 1.0), graph=False)

    def launch() -> float:
        program.reset()
        return sum(program.run(tokens)) / (tokens * layers)

    launch()
    name = f"cycle {dtype} dense" if recipe.is_dense else f"cycle {recipe}"
    ratio = read_ratio(recipe, lengths, shape, dtype)
    return Contender(name, group, n_bytes, tokens * layers, launch, ratio, recipe.hash)


def torch_sdpa(shape: AttentionShape, context: int, dtype: str, form: str, cold_bytes: int, threads: int) -> Contender:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.set_num_threads(threads)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    n_bytes = 2 * shape.batch * context * shape.kv_heads * shape.head_dim * kind.itemsize
    heads = shape.query_heads if form == "expanded" else shape.kv_heads
    rows = (copies(n_bytes, cold_bytes), shape.batch, heads, context, shape.head_dim)
    keys, values = torch.randn(rows, dtype=kind), torch.randn(rows, dtype=kind)
    # "folded" hands the query heads of a group over as queries of one head: without a mask the same result, K and V read once.
    per_head = (shape.kv_heads, shape.group) if form == "folded" else (shape.query_heads, 1)
    queries = torch.randn(shape.batch, *per_head, shape.head_dim, dtype=kind)
    grouped = form == "enable_gqa"

    def launch() -> float:
        start = perf_counter()
        with torch.inference_mode():
            for k, v in zip(keys, values, strict=True):
                scaled_dot_product_attention(queries, k, v, enable_gqa=grouped)
        return (perf_counter() - start) * 1e3 / len(keys)

    launch()
    return Contender(f"torch {dtype} {form}", f"torch {dtype}", n_bytes, len(keys), launch)


def contenders(backend: Backend, shape: AttentionShape, context: int, ratios: list[float], peers: bool) -> list[Contender]:
    device = backend.device
    every = [ours(backend, shape, context, dtype, DENSE, "dense") for dtype in ("fp32", "fp16", "bf16")]
    every += [ours(backend, shape, context, "bf16", Recipe.parse(text), text) for text in FORMATS]
    for ratio in ratios:
        if ratio < LEAST_PAGES_RATIO:
            every.append(ours(backend, shape, context, "bf16", resolve("stride", ratio, context, shape), f"stride C={ratio:g}"))
            continue
        solved = [resolve("int4,pages", ratio, context, shape, anchor_every=every) for every in (1, 4)]
        for recipe in [*solved, for_ratio(ratio, context, shape)]:
            every.append(ours(backend, shape, context, "bf16", recipe, f"pages C={ratio:g}"))
            every.append(cycle(backend, shape, context, "bf16", recipe, f"cycle C={ratio:g}"))
    for dtype in ("fp16", "bf16"):
        every.append(cycle(backend, shape, context, dtype, DENSE, "cycle dense"))
    for text in ("int8", "int4"):
        every.append(cycle(backend, shape, context, "bf16", Recipe.parse(text), f"cycle {text}"))
    if not peers:
        return every
    try:
        for dtype in ("fp32", "bf16"):
            for form in ("enable_gqa", "expanded", "folded") if shape.group > 1 else ("plain",):
                cold = CACHES_EXCEEDED * device.last_level_cache_bytes
                every.append(torch_sdpa(shape, context, dtype, form, cold, device.compute_units))
    except ImportError:
        print("torch is not installed: measured without it", file=sys.stderr)
    return every


def row(c: Contender, dense: Contender, read_gbs: float) -> dict[str, Any]:
    gbs = c.bytes_per_step / c.median_ms / 1e6
    return {
        "name": c.name,
        "group": c.group,
        "recipe_hash": c.recipe_hash,
        "ratio_read": round(c.ratio, 4),
        "bytes_per_step": c.bytes_per_step,
        "rotation_steps": c.steps,
        "median_ms": c.median_ms,
        "least_ms": c.least_ms,
        "gbs": gbs,
        "of_read_ceiling": gbs / read_gbs,
        "of_read_ceiling_at_least_time": c.bytes_per_step / c.least_ms / 1e6 / read_gbs,
        "fastest_dense_time_over_this": dense.median_ms / c.median_ms,
        "fastest_dense_time_over_this_at_least_times": dense.least_ms / c.least_ms,
        "kernel_error": c.kernel_error,
        "samples_ms": c.samples_ms,
    }


def measure(
    backend: Backend, name: str, shape: AttentionShape, context: int, ratios: list[float], rounds: int, peers: bool
) -> dict[str, Any]:
    every = contenders(backend, shape, context, ratios, peers)
    order = random.Random(0)
    for i in range(rounds):
        print(f"\r{name}: round {i + 1} of {rounds}", end="", file=sys.stderr, flush=True)
        for contender in order.sample(every, len(every)):
            contender.samples_ms.append(contender.launch())
    print(file=sys.stderr)
    ceilings = [backend.ceilings() for _ in range(CEILING_ROUNDS)]
    read_gbs = max(ceiling.read_gbs for ceiling in ceilings)
    dense = min((c for c in every if c.group == "dense"), key=lambda c: c.median_ms)
    dense_cycle = min((c for c in every if c.group == "cycle dense"), key=lambda c: c.median_ms)
    return {
        "workload": name,
        "shape": asdict(shape),
        "context": context,
        "fastest_dense": dense.name,
        "read_gbs": read_gbs,
        "copy_gbs": max(ceiling.copy_gbs for ceiling in ceilings),
        "flops": max(ceiling.flops for ceiling in ceilings),
        "rows": [row(c, dense_cycle if c.group.startswith("cycle") else dense, read_gbs) for c in every],
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['workload']}: read ceiling {result['read_gbs']:.1f} GB/s, fastest dense {result['fastest_dense']}")
    print(f"{'':46} {'median ms':>10} {'least ms':>9} {'GB/s':>7} {'ceiling':>8} {'x dense':>8} {'(least)':>8} {'error':>9}")
    for line in result["rows"]:
        error = "" if line["kernel_error"] is None else f"{line['kernel_error']:.1e}"
        print(
            f"{line['name']:46} {line['median_ms']:10.3f} {line['least_ms']:9.3f} {line['gbs']:7.1f} "
            f"{line['of_read_ceiling']:8.2f} "
            f"{line['fastest_dense_time_over_this']:8.2f} {line['fastest_dense_time_over_this_at_least_times']:8.2f} {error:>9}"
        )


def installed(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None


def write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")
    Path(file.name).replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--no-peers", dest="peers", action="store_false", help="leave PyTorch out, which takes most of the time"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    backend = open_backend(None)
    results = [
        measure(
            backend, "long context, grouped", AttentionShape(1, 32, 8, 128), 32768, [2, 4, 8], options.rounds, options.peers
        ),
        measure(backend, "short preset", AttentionShape(1, 16, 16, 64), 1024, [2], options.rounds, options.peers),
    ]
    for result in results:
        show(result)
    if options.output:
        versions = {p: installed(p) for p in ("elastickv", "numba", "llvmlite", "numpy", "torch")}
        document = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": asdict(backend.device),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "versions": versions,
            "results": results,
        }
        write(options.output, document)


if __name__ == "__main__":
    exit_with(main)
