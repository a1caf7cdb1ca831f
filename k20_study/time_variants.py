"""Decode times of variants of one kernel on the same caches, in mirrored rounds; CUDA-graph replay over caches beyond the L2."""

import argparse, gc, json, sys, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
from elastickv.backends.cuda.backend import CudaBackend
from elastickv.recipe import DENSE, AttentionShape, Recipe, for_ratio, step_bytes
from variants import ABLATED, RINGS, TIMED_ONLY, VARIANTS, built, compile_all, use

SHAPES = [(8, 32, 8, 128, 32768), (1, 32, 8, 128, 32768), (1, 32, 8, 128, 131072)]
CELLS = ["int4", "int8", "fp8", "auto@4", "auto@8"]


def recipe_of(text, row):
    name, _, budget = text.partition("@")
    return (
        for_ratio(float(budget), row[4], AttentionShape(*row[:4]))
        if budget
        else DENSE
        if text == "dense"
        else Recipe.parse(text)
    )


def variants_of(text):
    if text == "dense":
        return {"dense": {}}
    return (
        dict(VARIANTS) | RINGS.get(text, {}) | TIMED_ONLY.get(text, {}) | (ABLATED if text in ("int4", "int8", "fp8") else {})
    )


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--output", required=True)
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--cells", default=";".join(CELLS))
    p.add_argument("--shapes", default="0,1,2")
    o = p.parse_args()
    start = time.time()
    backend = CudaBackend(None, "auto")
    shapes = [SHAPES[int(i)] for i in o.shapes.split(",")]
    # compile everything at once
    jobs = set()
    for row in shapes:
        for text in o.cells.split(";"):
            recipe = recipe_of(text, row)
            planned = backend._variant(AttentionShape(*row[:4]), row[4], "bf16", recipe)
            jobs.add(planned)
            if planned.source == "decode_pages":
                jobs |= {built(planned.fixed(), m) for m in variants_of(text).values()} | {planned.storing()}
                if recipe.selection == "pages":
                    jobs.add(planned.selecting())
    compile_all(jobs)
    print(f"{len(jobs)} builds [{time.time() - start:.0f} s]", flush=True)
    ceilings = backend.ceilings()
    print(f"read ceiling {ceilings.read_gbs:.0f} GB/s", flush=True)
    result = {"device": vars(backend.device), "read_gbs": ceilings.read_gbs, "cells": []}
    for row in shapes:
        for text in ["dense", *o.cells.split(";")]:
            shape, context, recipe = AttentionShape(*row[:4]), row[4], recipe_of(text, row)
            n_bytes = step_bytes(recipe, [context] * shape.batch, shape).kv
            count = max(2, int(-(-6e8 // n_bytes)))
            rng = np.random.default_rng(1)
            queries = rng.standard_normal((shape.batch, shape.query_heads, shape.head_dim), dtype=np.float32)
            caches = [backend.cache(shape, context, "bf16", recipe) for _ in range(count)]
            for seed, cache in enumerate(caches):
                cache.fill_random(np.full(shape.batch, context), seed)
            planned, fixed = caches[0].variant, caches[0]._fixed
            steps = count * max(1, int(4e-3 / (count * n_bytes / 4e12)))
            programs, failed = {}, {}
            names = variants_of(text) if planned.source == "decode_pages" else {"planned": None}
            for name, macros in names.items():
                try:
                    if macros is not None:
                        for cache in caches:
                            use(cache, planned, fixed, macros)
                    programs[name] = backend.attention(caches, [queries] * count, steps, True)
                    programs[name].run(2)
                except Exception as error:
                    failed[name] = f"{type(error).__name__}: {error}"[:300]
            times = {name: [] for name in programs}
            order = list(programs)
            for r in range(o.rounds):
                for name in order if r % 2 == 0 else order[::-1]:
                    times[name].append(1e3 * programs[name].run(1)[0] / steps)
            cell = {
                "shape": row,
                "recipe": text,
                "parsed": str(recipe),
                "bytes": n_bytes,
                "floor_us": n_bytes / ceilings.read_gbs / 1e3,
                "kernel": planned.source,
                "fixed_blocks": fixed and fixed[1],
                "failed": failed,
                "us": {n: float(np.median(t)) for n, t in times.items()},
                "samples": times,
            }
            result["cells"].append(cell)
            floor = cell["floor_us"]
            print(
                f"{','.join(map(str, row))} {text:7} floor {floor:.1f} us: "
                + ", ".join(f"{n} {u:.2f} ({floor / u:.2f})" for n, u in cell["us"].items())
                + (f" FAILED {failed}" if failed else "")
                + f" [{time.time() - start:.0f} s]",
                flush=True,
            )
            Path(o.output).write_text(json.dumps(result, indent=1))
            programs.clear()
            caches.clear()
            gc.collect()


if __name__ == "__main__":
    main()
