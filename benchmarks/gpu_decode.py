"""Decode attention on a CUDA device beside PyTorch's SDPA backends: same shapes, graph replay, inputs rotated past the L2.

python benchmarks/gpu_decode.py --output FILE [--recipes "dense;int8"] [--builds "SPLITS=0;SPLITS=8,CLUSTER=0"] [--no-torch]
"""

import argparse
import gc
import json
import statistics

import numpy as np
from command_line import exit_with
from kernels import SHAPES

from elastickv.backends.cuda.backend import CudaBackend
from elastickv.recipe import AttentionShape, Recipe, dense_bytes, step_bytes

ROTATION_BYTES = 200e6  # four times the L2 of an H100


def rotation(n_bytes):
    return max(2, int(-(-ROTATION_BYTES // n_bytes)))


def ours_us(backend, row, recipe, launches=15):
    shape, context = AttentionShape(*row[:4]), row[4]
    n_bytes = step_bytes(recipe, [context] * shape.batch, shape).kv
    count = rotation(n_bytes)
    rng = np.random.default_rng(0)
    caches, queries = [], []
    for i in range(count):
        cache = backend.cache(shape, context, "bf16", recipe)
        cache.fill_random(np.full(shape.batch, context), seed=i)
        caches.append(cache)
        queries.append(rng.standard_normal((shape.batch, shape.query_heads, shape.head_dim), dtype=np.float32))
    program = backend.attention(caches, queries, count, True)
    program.run(3)
    us = statistics.median(program.run(launches)) / count * 1e3
    assert all(np.isfinite(o).all() for o in program.outputs())
    return us, n_bytes / us / 1e3


def torch_us(row, launches=15):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch, heads, kv_heads, dim, context = row
    count = rotation(dense_bytes([context] * batch, AttentionShape(*row[:4])))
    sizes = ((heads, 1), (kv_heads, context), (kv_heads, context))
    made = [tuple(torch.randn(batch, h, n, dim, device="cuda", dtype=torch.bfloat16) for h, n in sizes) for _ in range(count)]
    results = {}
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        try:
            with sdpa_kernel([getattr(SDPBackend, name)]):

                def rotate():
                    for q, k, v in made:
                        torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv_heads)

                side = torch.cuda.Stream()
                with torch.cuda.stream(side):
                    rotate()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    rotate()
            times = []
            for _ in range(launches + 3):
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                graph.replay()
                stop.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(stop) / count * 1e3)
            results[name.split("_")[0].lower()] = statistics.median(times[3:])
        except RuntimeError as error:
            results[name.split("_")[0].lower()] = None
            print(f"{row} {name}: {str(error).splitlines()[0]}")
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--builds", default="", help="macros of further builds, to compare with the one that is planned")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--recipes", default="dense;int8")
    parser.add_argument("--shapes", default="")
    options = parser.parse_args()
    shapes = [SHAPES[int(i)] for i in options.shapes.split(",")] if options.shapes else SHAPES
    backend = CudaBackend(None)
    ceilings, info = backend.ceilings(), backend.device
    rows = []
    result = {"device": vars(info), "ceilings": vars(ceilings), "rows": rows}
    print(info.name, f"read {ceilings.read_gbs:.0f} copy {ceilings.copy_gbs:.0f} GB/s, {ceilings.flops / 1e12:.0f} TFLOP/s")

    def record(row, what, us, gbs):
        rows.append({"shape": row, "what": what, "us": us, "gbs": gbs})
        print(f"{row!s:28} {what:28} {us:9.1f} us {gbs:7.0f} GB/s", flush=True)
        with open(options.output, "w") as file:
            json.dump(result, file, indent=1)

    for row in shapes:
        for text in options.recipes.split(";"):
            recipe = Recipe.parse(text)
            for build in ["", *filter(None, options.builds.split(";"))]:
                macros = {k: int(v) for k, v in (term.split("=") for term in build.split(",") if term)}
                us, gbs = ours_us(CudaBackend(None, "auto", macros) if macros else backend, row, recipe)
                record(row, f"{text} {build}".strip(), us, gbs)
                gc.collect()
        if not options.no_torch:
            import torch

            for name, us in torch_us(row).items():
                if us:
                    record(row, name, us, dense_bytes([row[4]] * row[0], AttentionShape(*row[:4])) / us / 1e3)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    exit_with(main)
