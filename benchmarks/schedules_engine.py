"""One backend of `random_schedules.py` in a vLLM engine of its own: reads the schedules, writes a line of JSON for each.

python benchmarks/schedules_engine.py PLAN.json ROWS.jsonl
"""

import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from command_line import exit_with

sys.path.insert(0, str(Path(__file__).parents[1]))  # the model with random weights, and the plain model, are the tests'

from random_schedules import COMPRESS, RECIPES, WINDOW, Run, Schedule, compared, summary

from benchmarks.read_rule import ReadRule
from elastickv.recipe import PAGE_TOKENS, AttentionShape, Recipe
from tests.helpers.read_rule import PlainLlama
from tests.helpers.served_llama import Sizes, random_weights, write_model
from tests.helpers.serving_engine import ServingEngine

SIZES = Sizes()
PARSED = {layer: Recipe.parse(f"{text},sinks=0,window={WINDOW}") for layer, text in RECIPES.items()}
LONGEST, BLOCKS = 512, {True: 90, False: 20}  # fewer than the requests need


class ScheduledEngine:
    """An engine whose requests' logits, codes and lists of pages are recorded."""

    def __init__(self, model, elastic):
        options = {"max_logprobs": SIZES.vocabulary, "logprobs_mode": "raw_logits", "enable_prefix_caching": True}
        options |= {"num_gpu_blocks_override": BLOCKS[elastic], "max_model_len": LONGEST}
        own = {"compress": COMPRESS, "window": WINDOW, "prefix_reuse": "strict"} if elastic else None
        self.engine, self.elastic = ServingEngine(model, own, **options), elastic
        self.codes, self.lists, self.in_chunks = {}, {}, Counter()
        self.whole_step = self.engine.scheduler.max_num_scheduled_tokens
        self.manager, self.pages = self.engine.scheduler.kv_cache_manager, self.engine.record.pages
        layers = self.engine.core.vllm_config.compilation_config.static_forward_context.values()
        self.layers = [layer for layer in layers if elastic and hasattr(layer, "impl")]
        schedule = self.engine.scheduler.schedule
        self.engine.scheduler.schedule = lambda *inputs, **options: self._scheduled(schedule(*inputs, **options))
        if elastic:
            self._record()

    def _scheduled(self, output):
        """Count the own tokens of requests that a step computes in chunks."""
        for name, count in output.num_scheduled_tokens.items():
            request = self.engine.scheduler.requests[name]
            if count > 1:
                own = request.num_computed_tokens - request.num_prompt_tokens
                self.in_chunks[name] += min(count, max(0, own))
        return output

    def _record(self):
        from elastickv.vllm.selection.decode_selection import AnchorField, DecodeSelection

        layer_of, keep = {id(layer.impl._selection): number for number, layer in enumerate(self.layers)}, DecodeSelection.keep
        free = self.manager.free

        def recorded_keep(selection, requests, selected):
            for anchor, lists in zip(selected.anchors, selected.lists[0], strict=True):
                request, row = int(anchor[AnchorField.REQUEST]), int(anchor[AnchorField.ROW])
                end = int(requests.starts[request + 1] - requests.starts[0])
                position = int(requests.lengths[request]) - end + row
                name = self._name(int(requests.blocks[request, position // PAGE_TOKENS]))
                pages = [sorted(each[:count].tolist()) for each, count in zip(lists, anchor[len(AnchorField) :], strict=True)]
                self.lists.setdefault(name, {})[layer_of[id(selection)], position] = pages
            keep(selection, requests, selected)

        def recorded_free(request):
            blocks = self.manager.get_block_ids(request.request_id)[self.pages][: request.num_computed_tokens // PAGE_TOKENS]
            codes = np.stack([layer.kv_cache[blocks].numpy() for layer in self.layers])
            self.codes.setdefault(request.request_id, []).append(codes)
            free(request)

        DecodeSelection.keep, self.manager.free = recorded_keep, recorded_free

    def _name(self, block):
        """Return the request that has a block as its newest."""
        requests = [request.request_id for request in self.engine.scheduler.running]
        return next(name for name in requests if block in self.manager.get_block_ids(name)[self.pages])

    def run(self, schedule):
        """Return the `Run` of each request of a schedule by its number, without those that were aborted."""
        self.engine.forget_prefixes()
        self.codes.clear(), self.lists.clear(), self.in_chunks.clear()
        self.engine.scheduler.max_num_scheduled_tokens = schedule.chunk
        names, outputs, step = {}, {}, 0
        while len(names) < len(schedule.requests) or self.engine.engine.has_unfinished_requests():
            for number, request in enumerate(schedule.requests):
                if number not in names and request.arrives <= step:
                    own = {} if request.ratio is None or not self.elastic else {"elastickv_compress": request.ratio}
                    names[number] = self.engine.add(
                        request.prompt, request.tokens, logprobs=SIZES.vocabulary, extra_args=own or None
                    )
                if request.aborts == step and names[number] not in outputs:
                    self.engine.engine.abort_request([names[number]])
            outputs |= self.engine.step()
            step += 1
        self.engine.scheduler.max_num_scheduled_tokens = self.whole_step
        return {number: self._run(outputs[name]) for number, name in names.items() if name in outputs}

    def alone(self, request):
        """Return the `Run` of a request alone, in a fresh cache."""
        return self.run(Schedule(0, self.whole_step, [replace(request, arrives=0, aborts=None)]))[0]

    def _run(self, output):
        (part,), name = output.outputs, output.request_id
        logits = np.array([[row[token].logprob for token in range(SIZES.vocabulary)] for row in part.logprobs])
        codes, lists = self.codes.get(name, []), self.lists.get(name, {})
        preemptions = self.engine.record.preemptions[name]
        cached = output.num_cached_tokens or 0
        return Run(list(part.token_ids), logits, codes, lists, cached, preemptions, self.in_chunks[name])


def layers_at(ratio):
    """Return the recipes of a request's ratio, by layer."""
    from elastickv.vllm.layer_formats import ServedModel, at_ratio

    shape = AttentionShape(1, SIZES.heads, SIZES.kv_heads, SIZES.head_dim)
    recipes = PARSED if ratio is None else at_ratio(PARSED, ratio, ServedModel(shape, SIZES.layers, LONGEST, "fp32"))
    return {layer: str(recipe) for layer, recipe in recipes.items()}


def lists_of_rule(weights, request, tokens):
    """Return the lists of pages by the read rule in float64: (layer, position) -> pages of each KV head."""
    if request.ratio == 1:
        return {}
    lists_of_layers, lists = [], ReadRule.lists

    def recorded(rule, *arguments):
        lists_of_layers.append(lists(rule, *arguments))
        return lists_of_layers[-1]

    ReadRule.lists = recorded
    try:
        model = PlainLlama(weights, layers=layers_at(request.ratio), exact_tokens=WINDOW)
        model.logits(request.prompt + tokens[:-1], prompt=len(request.prompt))
    finally:
        ReadRule.lists = lists
    return {
        (layer, position): [sorted(pages) for pages in of_heads]
        for layer, anchors in enumerate(lists_of_layers)
        for position, of_heads in anchors.items()
    }


def compute_products_in_float64():
    """Make PyTorch round products of float64 numbers: they depend neither on the batch nor on the chunk."""
    import torch
    from vllm.model_executor.layers import utils

    def rounded(product):
        def call(*inputs, **options):
            wide = [each.double() if torch.is_tensor(each) and each.is_floating_point() else each for each in inputs]
            return product(*wide, **options).float()

        return call

    linear = rounded(torch.nn.functional.linear)
    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(layer, "cpu_linear", linear)
    torch.nn.functional.scaled_dot_product_attention = rounded(torch.nn.functional.scaled_dot_product_attention)


def main():
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    schedules, weights, elastic = [Schedule.of(each) for each in plan["schedules"]], random_weights(), plan["elastickv"]
    if plan["products"] == "float64":
        compute_products_in_float64()
    if elastic:
        from elastickv.vllm import model_setup
        from elastickv.vllm.metrics import served_reads
        from elastickv.vllm.plugin import register

        register()
        for module in (model_setup, served_reads):  # as a calibration may choose them
            module.layer_recipes = lambda *arguments: PARSED
    with tempfile.TemporaryDirectory() as folder, Path(sys.argv[2]).open("w", encoding="utf-8") as rows:
        from elastickv.vllm.teacher_forcing.engine_environment import engine_environment

        engine = ScheduledEngine(write_model(Path(folder) / "model", weights), elastic)
        print(json.dumps(engine_environment(engine.engine.core)), file=rows, flush=True)
        for schedule in schedules:
            free, answered = engine.engine.free_blocks, []
            runs = engine.run(schedule)
            assert engine.engine.free_blocks == free, "blocks are lost"
            for number, scheduled in runs.items():
                request = schedule.requests[number]
                alone = engine.alone(request)
                answered.append(compared(scheduled, alone, lists_of_rule(weights, request, alone.tokens) if elastic else {}))
            print(json.dumps(summary(schedule.seed, len(schedule.requests), answered)), file=rows, flush=True)
    sys.stdout.flush()
    os._exit(0)  # an engine that is torn down by the interpreter may hang


if __name__ == "__main__":
    exit_with(main)
