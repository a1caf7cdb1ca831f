"""Store and decode in a serving engine's blocks: microseconds a layer, beside PyTorch's dense bf16 attention, in one run.

    python benchmarks/block_kernels.py --output benchmarks/results/h200/block_kernels.json [--recipes "int4;fp8"]

A captured graph goes round layers that exceed the L2 cache: store of one token a request, then decode, as in a decode step of
an engine. Dense attention reads contiguous keys and values, which favors it. Both are replayed in mirrored order; the
figures are medians. Requests have equal lengths, blocks are scattered; every 32nd step of a request quantizes a page: `page`
is such a step of all requests. `prefill`: a chunk of one request is stored, and all its tokens are gathered from pages.
`mixed`: one long request beside short ones, against as many of equal lengths with as many tokens in all, also where decodes
read listed pages: in steps that read the lists of an earlier one, and in steps in which all requests list theirs.
"""

import argparse
import datetime
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from command_line import exit_with
from gpu_name import gpu_name
from torch.nn.attention import SDPBackend, sdpa_kernel

from elastickv.backends.bad_token import NO_BAD_TOKEN
from elastickv.backends.cuda.block_arguments import BlocksArguments, GatherRows, PageListArguments, StepRows
from elastickv.backends.cuda.block_kernels import BlockKernels
from elastickv.backends.cuda.device import CudaDevice
from elastickv.kvcache.tensor_view import TensorView
from elastickv.recipe import PAGE_TOKENS, AttentionShape, Recipe

KV_HEADS, GROUP, DIM, WINDOW, BLOCK = 8, 4, 128, 128, 8
SHAPES = [(1, 4096), (1, 32768), (1, 65536), (8, 4096), (8, 32768), (64, 1024)]  # requests, context
PREFILLS = (2048, 8192, 16384, 65536)  # tokens
RECIPES = ("int4", "k=int8,v=int4", "int8", "fp8")
MIXED = ((131072, *(1024,) * 15), (131072, *(1024,) * 63))  # contexts of a batch
MIXED_RECIPES = ("int4", "int4,pages=1/4,anchor_every=16")
ROTATED_BYTES, ROUNDS, REPLAYS = 400e6, 8, 15


def view(tensor: torch.Tensor) -> TensorView:
    return TensorView(tensor.data_ptr(), "bf16", tuple(tensor.shape), tensor.stride())


def table(counts: Sequence[int]) -> tuple[torch.Tensor, int]:
    """Return blocks 1, 2, ... in random order, counts[i] of them in row i and 0 behind them; and how many there are."""
    blocks = (torch.randperm(sum(counts)).int() + 1).split(list(counts))
    return torch.nn.utils.rnn.pad_sequence(blocks, batch_first=True).contiguous().cuda(), sum(counts)


class Layers:
    """Layers of one batch in blocks.

    Parameters
    ----------
    contexts : tokens of each request. Where decodes read listed pages, the last 32 are of its own.
    """

    def __init__(self, device: CudaDevice, contexts: Sequence[int], recipe: Recipe) -> None:
        self.device, self.contexts, self.recipe = device, contexts, recipe
        requests, longest = len(contexts), max(contexts)
        capacity = -(-longest // PAGE_TOKENS) if recipe.selection == "pages" else 0
        shape = AttentionShape(requests, KV_HEADS * GROUP, KV_HEADS, DIM)
        self.kernels = BlockKernels(device, shape, "bf16", recipe, WINDOW, capacity)
        slab = self.kernels.slab.n_bytes
        self.n_bytes = sum((context - WINDOW) // PAGE_TOKENS for context in contexts) * KV_HEADS * slab
        self.count = max(2, math.ceil(ROTATED_BYTES / self.n_bytes))
        self.page_table, pages = table([context // PAGE_TOKENS + 1 for context in contexts])
        self.window_table, recent = table([context // BLOCK + 1 for context in contexts])
        windows = torch.zeros(recent + 1, KV_HEADS, BLOCK, 2 * DIM, dtype=torch.bfloat16, device="cuda")
        self.query = torch.randn(requests, KV_HEADS * GROUP, DIM, device="cuda").bfloat16()
        self.output = torch.empty_like(self.query)
        self.first = torch.zeros(requests, dtype=torch.int32, device="cuda")
        self.starts = torch.arange(requests + 1, dtype=torch.int32, device="cuda")
        self.slots = torch.arange(requests, device="cuda") + BLOCK
        self.bad = torch.full((requests,), NO_BAD_TOKEN, device="cuda")
        self.lengths = torch.tensor(contexts, dtype=torch.int32, device="cuda")
        self.tensors, self.layers = [windows], []
        for _ in range(self.count):
            stored = torch.zeros(pages + 1, KV_HEADS, slab, dtype=torch.uint8, device="cuda")
            self.layers.append(
                BlocksArguments(
                    pages=stored.data_ptr(),
                    window=windows.data_ptr(),
                    page_table=self.page_table.data_ptr(),
                    window_table=self.window_table.data_ptr(),
                    page_stride=stored.stride(0),
                    window_stride=windows.stride(0) * 2,
                    kv_heads=KV_HEADS,
                    slab_bytes=slab,
                    page_columns=self.page_table.shape[1],
                    window_columns=self.window_table.shape[1],
                    window_shift=BLOCK.bit_length() - 1,
                )
            )
            self.tensors.append(stored)
            self.fill(self.layers[-1])
        self.step = [torch.randn(requests, KV_HEADS, DIM, device="cuda").bfloat16() for _ in range(2)]
        self.rows = StepRows.of(*map(view, self.step))
        self.lists = [self.lists_of(capacity) for _ in range(self.count)] if capacity else [None] * self.count

    def fill(self, blocks: BlocksArguments) -> None:
        """Store random prompts, one request at a time."""
        self.device.follow(torch.cuda.current_stream().cuda_stream)
        requests = len(self.contexts)
        for request, context in enumerate(self.contexts):
            slots = torch.zeros(context, dtype=torch.int64, device="cuda")
            keys, values = (torch.randn(context, KV_HEADS, DIM, device="cuda").bfloat16() for _ in range(2))
            starts = torch.zeros(requests + 1, dtype=torch.int32, device="cuda")
            starts[request + 1 :] = context
            lengths = torch.where(torch.arange(requests, device="cuda") == request, context, 0).int()
            inputs = (each.data_ptr() for each in (lengths, starts, slots, self.bad))
            self.kernels.store(blocks, StepRows.of(view(keys), view(values)), *inputs, requests, context)
            torch.cuda.synchronize()

    def lists_of(self, capacity: int) -> PageListArguments:
        """Return one layer's memory of lists."""
        requests = len(self.contexts)
        indices = torch.arange(requests, dtype=torch.int32, device="cuda")
        prompts, ratios = self.lengths - PAGE_TOKENS, torch.zeros_like(indices)
        fractions = torch.tensor([[self.recipe.fraction(head) for head in range(KV_HEADS)]], dtype=torch.float64, device="cuda")
        headers = torch.full((requests, 1, KV_HEADS, 4), -1, dtype=torch.int32, device="cuda")
        page_lists = torch.zeros(requests, 1, KV_HEADS, capacity, dtype=torch.uint16, device="cuda")
        self.tensors += [indices, prompts, ratios, fractions, headers, page_lists]
        return PageListArguments(
            request_indices=indices.data_ptr(),
            prompts=prompts.data_ptr(),
            ratio_numbers=ratios.data_ptr(),
            fractions=fractions.data_ptr(),
            headers=headers.data_ptr(),
            page_lists=page_lists.data_ptr(),
            anchor_every=self.recipe.anchor_every,
            anchor_offset=0,
            ring=1,
            list_capacity=capacity,
        )

    def enqueue(self, layer: int) -> None:
        self.device.follow(torch.cuda.current_stream().cuda_stream)
        layer %= self.count
        step = (each.data_ptr() for each in (self.lengths, self.starts, self.slots, self.bad))
        self.kernels.store(self.layers[layer], self.rows, *step, len(self.contexts), 1)
        lengths, first = self.lengths.data_ptr(), self.first.data_ptr()
        self.kernels.decode(
            self.layers[layer], self.rows, view(self.query), self.output.data_ptr(), lengths, first, lists=self.lists[layer]
        )


def captured(enqueue, count: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        enqueue(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for i in range(count):
            enqueue(i)
    return graph


def replayed_us(graph: torch.cuda.CUDAGraph, count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count * 1e3


def dense(requests: int, context: int):
    """Return the cuDNN attention of one layer of several, and their number."""
    n_bytes = requests * context * KV_HEADS * DIM * 4
    count = max(2, math.ceil(ROTATED_BYTES / n_bytes))
    query = torch.randn(requests, KV_HEADS * GROUP, 1, DIM, device="cuda").bfloat16()
    kv = [torch.randn(2, requests, KV_HEADS, context, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(count)]

    def enqueue(layer: int) -> None:
        keys, values = kv[layer % count]
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return enqueue, count


def measure(device: CudaDevice, requests: int, context: int, recipe: str) -> dict:
    layers = Layers(device, [context] * requests, Recipe.parse(recipe))
    steps = ROUNDS * layers.count
    graphs = {"page": captured(layers.enqueue, steps)}
    layers.lengths -= 5
    attend, count = dense(requests, context)
    baseline = captured(attend, ROUNDS * count)
    times: dict[str, list[float]] = {"ours": [], "dense": [], "page": []}
    for replay in range(REPLAYS + 2):
        order = ("ours", "dense") if replay % 2 else ("dense", "ours")
        for which in (*order, *reversed(order)):
            us = replayed_us(baseline, ROUNDS * count) if which == "dense" else replayed_us(graphs["page"], steps)
            if replay >= 2:
                times[which].append(us)
    layers.lengths += 5
    times["page"] = [replayed_us(graphs["page"], steps) for _ in range(REPLAYS)]
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "requests": requests,
        "context": context,
        "recipe": recipe,
        "dense_us": middle["dense"],
        "step_us": middle["ours"],
        "step_with_page_us": middle["page"],
        "speedup": middle["dense"] / middle["ours"],
        "pages_gbs": layers.n_bytes / middle["ours"] / 1e3,
    }


def measure_prefill(device: CudaDevice, tokens: int, recipe: str) -> dict:
    layers = Layers(device, [tokens], Recipe.parse(recipe))
    keys, values = (torch.randn(tokens, KV_HEADS, DIM, device="cuda").bfloat16() for _ in range(2))
    gathered = [torch.empty_like(keys) for _ in range(2)]
    step = StepRows.of(view(keys), view(values))
    starts, slots = torch.tensor([0, tokens]).int().cuda(), torch.zeros(tokens, dtype=torch.int64, device="cuda")
    first, count, exact = (torch.tensor([n]).int().cuda() for n in (0, tokens, tokens))
    ends = {"first": first.data_ptr(), "count": count.data_ptr(), "start": first.data_ptr(), "exact_first": exact.data_ptr()}
    wanted = GatherRows(**ends, first_request=0)

    def store(layer: int) -> None:
        device.follow(torch.cuda.current_stream().cuda_stream)
        inputs = (each.data_ptr() for each in (layers.lengths, starts, slots, layers.bad))
        layers.kernels.store(layers.layers[layer % layers.count], step, *inputs, 1, tokens)

    def gather(layer: int) -> None:
        device.follow(torch.cuda.current_stream().cuda_stream)
        addresses = (each.data_ptr() for each in gathered)
        layers.kernels.gather(layers.layers[layer % layers.count], wanted, *addresses, 1, tokens)

    us = {}
    for name, enqueue in (("store", store), ("gather", gather)):
        graph = captured(enqueue, layers.count)
        us[name] = statistics.median([replayed_us(graph, layers.count) for _ in range(REPLAYS + 2)][2:])
    pages, rows = tokens // 32 * KV_HEADS * layers.kernels.slab.n_bytes, 2 * keys.nbytes
    gbs = {f"{name}_gbs": (pages + rows) / us[name] / 1e3 for name in us}
    return {"tokens": tokens, "recipe": recipe, "store_us": us["store"], "gather_us": us["gather"], **gbs}


def measure_mixed(device: CudaDevice, contexts: Sequence[int], recipe: str) -> dict:
    equal = [sum(contexts) // len(contexts) // PAGE_TOKENS * PAGE_TOKENS] * len(contexts)
    us: dict[str, dict[str, float]] = {}
    for batch, lengths in (("mixed", contexts), ("equal", equal)):
        layers = Layers(device, lengths, Recipe.parse(recipe))
        graph = captured(layers.enqueue, ROUNDS * layers.count)
        us[batch] = {}
        # The first token of a request's own lists its pages, at position context - 32.
        steps = {"anchor": PAGE_TOKENS - 1, "step": PAGE_TOKENS - 5} if layers.recipe.selection == "pages" else {"step": 5}
        for step, before_end in steps.items():
            layers.lengths -= before_end
            times = [replayed_us(graph, ROUNDS * layers.count) for _ in range(REPLAYS + 2)]
            layers.lengths += before_end
            us[batch][step] = statistics.median(times[2:])
        del layers, graph
        torch.cuda.empty_cache()
    ratios = {f"{step}_of_equal": us["mixed"][step] / us["equal"][step] for step in us["equal"]}
    return {"contexts": list(contexts), "equal_context": equal[0], "recipe": recipe, "us": us, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipes", default=";".join(RECIPES))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = CudaDevice(0)
    cells = []
    for requests, context in SHAPES:
        for recipe in arguments.recipes.split(";"):
            cells.append(measure(device, requests, context, recipe))
            torch.cuda.empty_cache()
            print(json.dumps(cells[-1]), flush=True)
    mixed = []
    for contexts, recipe in itertools.product(MIXED, MIXED_RECIPES):
        mixed.append(measure_mixed(device, contexts, recipe))
        print(json.dumps(mixed[-1] | {"contexts": len(contexts)}), flush=True)
    prefills = []
    for tokens, recipe in itertools.product(PREFILLS, arguments.recipes.split(";")):
        prefills.append(measure_prefill(device, tokens, recipe))
        torch.cuda.empty_cache()
        print(json.dumps(prefills[-1]), flush=True)
    record = {
        "kind": "elastickv-block-kernels",
        "version": 1,
        **gpu_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__, "cuda-core": version("cuda-core")},
        "shape": {"kv_heads": KV_HEADS, "group": GROUP, "head_dim": DIM, "window": WINDOW, "window_block": BLOCK},
        "cells": cells,
        "mixed": mixed,
        "prefill": prefills,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    exit_with(main)
