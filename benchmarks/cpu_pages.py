"""Compare versions of the CPU backend: the tokens at which pages leave the window, and the first decode on a fresh machine.

    python benchmarks/cpu_pages.py before=../old/src after=src --output benchmarks/results/cpu/pages.json

Each version runs in processes of its own, in turn with the others. A cycle is 64 tokens through all layers, as in `bench`: of
each token the least and the median time over all rounds of all processes. The first decode runs with an empty folder of
compiled kernels, the second one in another process with what the first one left: wall time, and the processor's with that of
children.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

RECIPES = ("k=int8,v=int4,vgroup=32", "int8", "int4", "fp8", "int8,stride=4")
CONTEXT, TOKENS, LAYERS, HEADS, HEAD_DIM = 1024, 64, 16, 16, 64


def first_decode() -> dict[str, float]:
    """Decode once and return the seconds since the start, imports included."""
    start = perf_counter()
    from elastickv.backends.cpu import open_backend
    from elastickv.recipe import AttentionShape, Recipe

    shape = AttentionShape(1, HEADS, HEADS, HEAD_DIM)
    cache = open_backend(None).cache(shape, CONTEXT, "bf16", Recipe.parse(RECIPES[0]))
    cache.fill_random(np.array([CONTEXT]), 0)
    cache.decode(np.ones((1, HEADS, HEAD_DIM), np.float32))
    used = os.times()
    return {"wall_s": perf_counter() - start, "cpu_s": sum(used[:4])}


def cycle_ms(rounds: int) -> dict[str, Any]:
    """Return the milliseconds of each token of each round, by recipe, and the device."""
    from elastickv.backends.cpu import open_backend
    from elastickv.backends.feedback import Feedback
    from elastickv.recipe import AttentionShape, Recipe

    backend, shape = open_backend(None), AttentionShape(1, HEADS, HEADS, HEAD_DIM)
    times = {}
    for text in RECIPES:
        caches = [backend.cache(shape, CONTEXT + TOKENS, "bf16", Recipe.parse(text)) for _ in range(LAYERS)]
        for seed, cache in enumerate(caches):
            cache.fill_random(np.array([CONTEXT]), seed)
        first = np.random.default_rng(0).standard_normal((1, HEADS, HEAD_DIM), dtype=np.float32)
        program = backend.cycle(caches, first, Feedback.seeded(HEAD_DIM, 0, 1.0, 1.0, 1.0), graph=False)
        times[text] = []
        for _ in range(rounds + 1):
            program.reset()
            times[text].append(program.run(TOKENS))
        times[text].pop(0)
    return {"device": asdict(backend.device), "times": times}


def measured(folder: str, task: str, cache: str, **variables: str) -> Any:
    """Run a task of this script with the package in `folder` and return what it prints."""
    environment = os.environ | variables | {"PYTHONPATH": str(Path(folder).resolve()), "ELASTICKV_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, __file__, task], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def summary(rounds: list[list[float]]) -> dict[str, Any]:
    """Return each token's times, and the tokens that took longest against the others."""
    least, medians = np.min(rounds, axis=0), np.median(rounds, axis=0)
    pages = [token for token in range(TOKENS) if (CONTEXT + token + 1 - 4 - 128) % 32 == 0]
    others = [token for token in range(TOKENS) if token not in pages]
    return {
        "page_tokens": [token + 1 for token in pages],
        "page_token_least_ms": median(least[pages]),
        "other_token_least_ms": median(least[others]),
        "page_token_median_ms": median(medians[pages]),
        "other_token_median_ms": median(medians[others]),
        "least_ms": least.round(4).tolist(),
        "median_ms": medians.round(4).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", metavar="NAME=FOLDER", help="versions: a name and a folder with the package")
    parser.add_argument("--processes", type=int, default=3, help="of each version")
    parser.add_argument("--rounds", type=int, default=8, help="cycles of each process")
    parser.add_argument("--threads", default="1", help="of the cycles: more wait for each other where others use the machine")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    folders = dict(source.split("=", 1) for source in options.sources)
    times: dict[str, dict[str, list[Any]]] = {name: {text: [] for text in RECIPES} for name in folders}
    starts: dict[str, dict[str, Any]] = {}
    device = None
    with tempfile.TemporaryDirectory() as compiled:
        for name, folder in folders.items():
            cache = str(Path(compiled, name))
            starts[name] = {state: measured(folder, "first", cache) for state in ("empty_cache", "full_cache")}
            measured(folder, "1", cache, NUMBA_NUM_THREADS=options.threads)  # compiles the other recipes' kernels
        for _ in range(options.processes):
            for name, folder in folders.items():
                print(f"{name} ...", file=sys.stderr)
                one = measured(folder, str(options.rounds), str(Path(compiled, name)), NUMBA_NUM_THREADS=options.threads)
                device = one["device"]
                for text, rounds in one["times"].items():
                    times[name][text] += rounds
    document = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("numpy", "numba", "llvmlite")},
        "workload": {"context": CONTEXT, "tokens": TOKENS, "layers": LAYERS, "heads": HEADS, "head_dim": HEAD_DIM},
        "processes": options.processes,
        "rounds": options.rounds,
        "first_decode": starts,
        "cycles": {name: {text: summary(rounds) for text, rounds in by.items()} for name, by in times.items()},
    }
    for name in folders:
        empty, full = (starts[name][state] for state in ("empty_cache", "full_cache"))
        print(f"{name}: first decode {empty['wall_s']:.1f} s ({empty['cpu_s']:.1f} CPU), then {full['wall_s']:.1f} s")
        for text, one in document["cycles"][name].items():
            print(f"  {text:26} page token {one['page_token_least_ms']:8.2f} ms, others {one['other_token_least_ms']:8.2f} ms")
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1] == "first":
        print(json.dumps(first_decode()))
    elif len(sys.argv) == 2 and sys.argv[1].isdigit():
        print(json.dumps(cycle_ms(int(sys.argv[1]))))
    else:
        main()
