"""Every CUDA kernel on small shapes under compute-sanitizer: memcheck and racecheck.

    python benchmarks/sanitize.py --output benchmarks/results/h100/sanitizer.json [--tools memcheck,racecheck]

Each tool runs one process over all cases; a case is appended to and decoded through a page that leaves the window, its outputs
checked against the float64 oracle, and a short inference cycle follows, whose kernels overlap. The file holds what each tool
said.
"""

import argparse
import datetime
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from elastickv.attention.errors import relative_l2
from elastickv.attention.feedback import Feedback
from elastickv.cache import Oracle
from elastickv.recipe import AttentionShape, Recipe

# kernel, macros, recipe, (batch, query heads, KV heads, head_dim), lengths
CASES = [
    ("auto", {}, "int4,pages=1/4,anchor_every=2", (2, 8, 2, 128), (300, 300)),
    ("auto", {}, "int4,pages=1/4:1/3,anchor_every=2", (2, 8, 2, 64), (300, 165)),
    ("auto", {}, "fp8", (2, 6, 2, 80), (200, 200)),
    ("auto", {}, "k=int8,v=int4,vgroup=32", (2, 18, 2, 64), (250, 33)),
    ("pages", {}, "k=bf16,v=int8", (2, 2, 2, 96), (260, 131)),
    ("pages", {}, "int8", (1, 8, 1, 256), (260,)),
    ("simt", {}, "int4,pages=1/4,anchor_every=2", (2, 8, 2, 128), (300, 165)),
    ("simt", {}, "k=fp8,v=int8", (2, 6, 2, 80), (200, 64)),
    ("mma", {"SPLITS": 0}, "int8,stride=2", (2, 8, 2, 128), (300, 165)),
    ("mma", {"SPLITS": 0}, "bf16,reuse,anchor_every=3", (2, 6, 2, 64), (260, 131)),
    ("mma", {"SPLITS": 8}, "int8", (1, 8, 2, 128), (300,)),
    ("mma", {"SPLITS": 4, "CLUSTER": 0}, "dense", (1, 8, 2, 64), (300,)),
    ("simt", {}, "int8", (2, 8, 2, 128), (300, 165)),
    ("simt", {}, "bf16,reuse,anchor_every=3", (2, 6, 2, 80), (260, 131)),
    ("auto", {}, "dense", (2, 6, 2, 80), (260, 131)),
]


def run_cases(limit: float) -> None:
    """Run every case in this process; prints one line a case."""
    from elastickv.backends.cuda.backend import CudaBackend

    started = time.monotonic()
    for kind, macros, text, dims, lengths in CASES:
        if time.monotonic() - started > limit:
            print(f"case {kind} {text}: left out, the time is up", flush=True)
            continue
        recipe, shape, rng = Recipe.parse(text), AttentionShape(*dims), np.random.default_rng(0)
        backend, capacity = CudaBackend(None, kind, macros), max(lengths) + 60
        cache = backend.cache(shape, capacity, "bf16", recipe)
        cache.prefill(*tokens(rng, shape, max(lengths)), np.array(lengths))
        oracle = Oracle(cache)
        for _ in range(34):
            cache.append(*(t[:, :, 0] for t in tokens(rng, shape, 1)))
            queries = rng.standard_normal((shape.batch, shape.query_heads, shape.head_dim), dtype=np.float32)
            outputs, expected = cache.decode(queries)[0], oracle.decode(queries)[0]
            if (error := relative_l2(outputs, expected).max()) > 4e-3:
                raise SystemExit(f"case {kind} {text}: kernel error {error:.1e}")
        caches = [backend.cache(shape, capacity, "bf16", recipe) for _ in range(2)]
        for cache in caches:
            cache.prefill(*tokens(rng, shape, max(lengths)), np.array(lengths))
        feedback = Feedback.seeded(shape.head_dim, 1, 1.0, 1.0, 1.0)
        backend.cycle(caches, queries, feedback, True).run(34)
        print(f"case {kind} {text}: ran", flush=True)


def tokens(rng, shape, count):
    """Return random keys and values, (2, batch, kv_heads, count, head_dim)."""
    return rng.standard_normal((2, shape.batch, shape.kv_heads, count, shape.head_dim), dtype=np.float32)


def main() -> None:
    """Run the tools and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tools", default="memcheck,racecheck")
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds of cases a tool")
    parser.add_argument("--cases", action="store_true", help="run the cases in this process, without a tool")
    options = parser.parse_args()
    if options.cases:
        run_cases(options.time_limit)
        return
    sanitizer = shutil.which("compute-sanitizer")
    if not sanitizer or not options.output:
        sys.exit("compute-sanitizer of the CUDA toolkit must be on the PATH, and --output name a file")
    from elastickv.measure.environment import environment

    results = {}
    for tool in options.tools.split(","):
        command = [sys.executable, __file__, "--cases", "--time-limit", str(options.time_limit)]
        run = subprocess.run([sanitizer, "--tool", tool, *command], capture_output=True, text=True)
        lines = (run.stdout + run.stderr).splitlines()
        said = list(itertools.dropwhile(lambda line: "SUMMARY" not in line, lines))[:1]
        results[tool] = {"summary": said[0].strip("= ") if said else "", "exit": run.returncode}
        results[tool]["cases"] = [line for line in lines if line.startswith("case ")]
        results[tool]["findings"] = [line for line in lines if line.startswith("=========")][:40]
        print(tool, results[tool]["summary"], len(results[tool]["cases"]), "cases", flush=True)
    file = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(), "tools": results}
    file["environment"] = environment()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(file, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
