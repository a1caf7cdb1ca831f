"""Every CUDA kernel on small shapes under compute-sanitizer: memcheck, racecheck, initcheck and synccheck.

    python benchmarks/sanitize.py --output benchmarks/results/h100/sanitizer.json [--tools memcheck,racecheck] [--jobs 8]

A case is one kind of kernel with one recipe, in a process of its own under each tool: filled, appended to until a page has left
the window, decoded against the float64 oracle; a chunk behind it, its rows moved, read back and cropped within the window and
far behind it; then a short inference cycle, whose kernels overlap. The file holds what each tool said of each case.
"""

import argparse
import datetime
import itertools
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from elastickv.attention.errors import relative_l2
from elastickv.attention.feedback import Feedback
from elastickv.cache import Oracle
from elastickv.recipe import AttentionShape, Recipe

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
BARRIERS = 1 << 13  # that synccheck tracks; a launch fails where a kernel's blocks have more between them
# kernel, macros, recipe, (batch, query heads, KV heads, head_dim), lengths: two tokens before a page leaves the window
CASES = [
    ("auto", {}, "int4,pages=1/4,anchor_every=2", (2, 8, 2, 128), (290, 290)),
    ("auto", {}, "int4,pages=1/4:1/3,anchor_every=2", (2, 8, 2, 64), (290, 162)),
    ("auto", {}, "fp8", (2, 6, 2, 80), (194, 194)),
    ("auto", {}, "k=int8,v=int4,vgroup=32", (2, 18, 2, 64), (258, 33)),
    ("pages", {}, "k=bf16,v=int8", (2, 2, 2, 96), (258, 130)),
    ("pages", {}, "int8", (1, 8, 1, 256), (258,)),
    ("simt", {}, "int4,pages=1/4,anchor_every=2", (2, 8, 2, 128), (290, 162)),
    ("simt", {}, "k=fp8,v=int8", (2, 6, 2, 80), (194, 64)),
    ("mma", {"SPLITS": 0}, "int8,stride=2", (2, 8, 2, 128), (290, 162)),
    ("mma", {"SPLITS": 0}, "bf16,reuse,anchor_every=3", (2, 6, 2, 64), (258, 130)),
    ("mma", {"SPLITS": 8}, "int8", (1, 8, 2, 128), (290,)),
    ("mma", {"SPLITS": 4, "CLUSTER": 0}, "dense", (1, 8, 2, 64), (290,)),
    ("simt", {}, "int8", (2, 8, 2, 128), (290, 162)),
    ("simt", {}, "bf16,reuse,anchor_every=3", (2, 6, 2, 80), (258, 130)),
    ("auto", {}, "dense", (2, 6, 2, 80), (258, 130)),
]


def run_case(number: int) -> None:
    """Run one case in this process; exits with a line where a result is wrong."""
    from elastickv.backends.cuda.backend import CudaBackend

    kind, macros, text, dims, lengths = CASES[number]
    recipe, shape, rng = Recipe.parse(text), AttentionShape(*dims), np.random.default_rng(0)
    backend, capacity = CudaBackend(None, kind, macros), max(lengths) + 60
    cache = backend.cache(shape, capacity, "bf16", recipe)
    cache.prefill(*tokens(rng, shape, max(lengths)), np.array(lengths))
    queries = rng.standard_normal((shape.batch, shape.query_heads, shape.head_dim), dtype=np.float32)

    def decode(changed, oracle) -> None:
        changed.append(*(t[:, :, 0] for t in tokens(rng, shape, 1)))
        error = relative_l2(changed.decode(queries)[0], oracle.decode(queries)[0]).max()
        if error > 4e-3:
            sys.exit(f"kernel error {error:.1e}")

    oracle = Oracle(cache)
    for _ in range(4):
        decode(cache, oracle)
    cache.extend(*tokens(rng, shape, 40), np.full(shape.batch, 40))
    moved = cache.gather(np.arange(shape.batch)[::-1].copy(), capacity)
    before = cache.read(0, capacity)
    moved.crop(moved.lengths - 3)
    for now, was in zip(moved.read(0, capacity), before, strict=True):
        for row, length in enumerate(moved.lengths):
            if not np.array_equal(now[row, :, :length], was[shape.batch - 1 - row, :, :length]):
                sys.exit("rows differ after they moved")
    if "stride" not in text:
        moved.crop(np.maximum(moved.lengths - 140, 1))
    decode(moved, Oracle(moved))
    moved.raise_non_finite()

    caches = [backend.cache(shape, capacity, "bf16", recipe) for _ in range(2)]
    for cache in caches:
        cache.prefill(*tokens(rng, shape, max(lengths)), np.array(lengths))
    backend.cycle(caches, queries, Feedback.seeded(shape.head_dim, 1, 1.0, 1.0, 1.0), True).run(4)


def tokens(rng, shape, count):
    """Return random keys and values, (2, batch, kv_heads, count, head_dim)."""
    return rng.standard_normal((2, shape.batch, shape.kv_heads, count, shape.head_dim), dtype=np.float32)


def watch(sanitizer: str, tool: str, number: int, limit_s: float, latest: float) -> dict:
    """Run one case under one tool, unless it is too late to begin."""
    kind, macros, text, dims, lengths = CASES[number]
    case = {"tool": tool, "kernel": kind, "macros": macros, "recipe": text, "shape": dims, "lengths": lengths}
    start = time.monotonic()
    if start > latest:
        return case | {"clean": None, "summary": "left out: the time was up"}
    options = ["--tool", tool, "--error-exitcode", "9"]
    if tool == "synccheck":
        options += ["--num-cuda-barriers", str(BARRIERS)]
    command = [sanitizer, *options, sys.executable, __file__, "--case", str(number)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return case | {"clean": None, "summary": f"not finished after {limit_s:g} s"}
    lines = (run.stdout + run.stderr).splitlines()
    said = [line.strip("= ") for line in lines if "SUMMARY" in line]
    case |= {"clean": run.returncode == 0, "summary": "; ".join(said), "seconds": round(time.monotonic() - start, 1)}
    return case if case["clean"] else case | {"exit": run.returncode, "lines": lines[:60]}


def main() -> None:
    """Run the tools and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--jobs", type=int, default=8, help="processes at once")
    parser.add_argument("--case-limit", type=float, default=200.0, help="seconds a case")
    parser.add_argument("--time-limit", type=float, default=900.0, help="seconds after which no case begins")
    parser.add_argument("--case", type=int, help="run this case in this process, without a tool")
    options = parser.parse_args()
    if options.case is not None:
        run_case(options.case)
        return
    sanitizer = shutil.which("compute-sanitizer")
    if not sanitizer or not options.output:
        sys.exit("compute-sanitizer of the CUDA toolkit must be on the PATH, and --output name a file")
    from elastickv.backends import load
    from elastickv.measure.environment import environment

    device = load("cuda")[0].device
    runs = list(itertools.product(options.tools.split(","), range(len(CASES))))
    latest = time.monotonic() + options.time_limit
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda run: watch(sanitizer, *run, options.case_limit, latest), runs))
    for row in rows:
        print(row["tool"], row["kernel"], row["recipe"], "clean" if row["clean"] else "NOT CLEAN", row["summary"], flush=True)
    file = {
        "date_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "device": device.name,
        "driver": device.driver,
    }
    file |= {"clean": sum(row["clean"] is True for row in rows), "runs": len(rows), "cases": rows, "environment": environment()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(file, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
