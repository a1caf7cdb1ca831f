"""One contender of `serving.py` in a vLLM engine of its own: reads what to measure, writes a record after each measurement.

    python benchmarks/serving_engine.py PLAN.json RECORD.json

The requests of a measurement run together: the same number of tokens each, all begun and ended in the same engine steps, which
is checked. A step is the mean of the last 128 of 136 steps, as `(time of 136 tokens - time of 8 tokens) / 128` is.
"""

import copy
import itertools
import json
import os
import random
import sys
import time
import traceback
from functools import partial
from pathlib import Path

from command_line import exit_with
from serving_record import NotTogether, Recorder, said

from elastickv.vllm.teacher_forcing.engine_environment import engine_environment, worker_memory

TOKENS, SETTLED = 136, 8
SAMPLE_TOKENS = 1024  # of the prompt whose blocks fill the cache
_OF_SLOW = 0.5  # the share of samples that is taken of throughput and first token
_FEWER_REQUESTS = 5  # how often a batch that does not stay together is made smaller


class Engine:
    """An engine, and the requests that are put to it."""

    def __init__(self, plan):
        from vllm import LLM
        from vllm.config import CompilationConfig, KVTransferConfig

        self.plan, self.cuda = plan, plan["device"] == "cuda"
        options = dict(plan["engine"])
        sizes = options.pop("cudagraph_capture_sizes", None)
        if sizes and not (options.get("enforce_eager") or "compilation_config" in options):
            options["compilation_config"] = CompilationConfig(cudagraph_capture_sizes=sizes)
        if plan["fill"]:
            filler = {"kv_connector": "CacheFiller", "kv_connector_module_path": "cache_filler", "kv_role": "kv_both"}
            options["kv_transfer_config"] = KVTransferConfig(**filler)
        self.llm = LLM(model=plan["model"], skip_tokenizer_init=True, seed=0, **options)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.config = self.core.vllm_config
        generator = random.Random(1)
        self._tokens = min(128000, self.config.model_config.get_vocab_size())
        longest = max([context for context, _ in plan["cells"]] + [plan["capacity"], plan["first_token"], SAMPLE_TOKENS])
        self._body = [generator.randrange(5, self._tokens) for _ in range(longest)]
        self._numbers, self._requests = itertools.count(), []

    def prompt(self, tokens):
        """Return a prompt that no other begins like: nothing of it is in the prefix cache."""
        number = next(self._numbers)
        head = [5 + number % (self._tokens - 5), 5 + number // (self._tokens - 5)]
        return {"prompt_token_ids": [*head, *self._body[: tokens - 2]]}

    def enqueue(self, prompts, tokens, what=None):
        from vllm import SamplingParams

        extra = {"extra_args": {"kv_transfer_params": {what: True}}} if what and self.plan["fill"] else {}
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **extra)
        self.abort()
        self._requests = self.llm.enqueue(prompts, params, use_tqdm=False)

    def abort(self):
        """Abort what is left of the requests: all of them after a probe, some after a step that failed."""
        if self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.abort_request(self._requests, internal=True)

    def run(self):
        """Run what was enqueued; return when each step ended, and how many requests ended in the last one."""
        engine, ended, finished = self.llm.llm_engine, [], 0
        while engine.has_unfinished_requests():
            finished = sum(output.finished for output in engine.step()) or finished
            ended.append(time.perf_counter())
        return ended, finished

    def seconds_to_first_token(self, context):
        """Return the seconds from a prompt to its first token."""
        began = time.perf_counter()
        self.enqueue([self.prompt(context)], 1)
        return self.run()[0][-1] - began

    def step_ms(self, context, prompts):
        """Return milliseconds of a decode step of all these prompts at once; the last step ends at the context.

        Where a filler is there, prompts are replaced by new ones, which no prefix cache holds.
        """
        if self.plan["fill"]:
            prompts = [self.prompt(context - TOKENS) for _ in prompts]
        self.enqueue(prompts, TOKENS, "fill")
        ended, finished = self.run()
        if finished != len(prompts):
            raise NotTogether(f"{len(prompts)} requests did not decode together: {finished} ended in the last step")
        return (ended[-1] - ended[-1 - (TOKENS - SETTLED)]) / (TOKENS - SETTLED) * 1e3

    def reads(self, context, prompts):
        """Return the counters of ElasticKV's metrics after such steps.

        vLLM's statistics are off while steps are timed, so that these are other ones.
        """
        scheduler = self.core.scheduler
        scheduler.reads = scheduler.read_counter()
        try:
            self.step_ms(context, prompts)
            return vars(scheduler.reads.take())
        finally:
            scheduler.reads = None

    def prompts(self, context, batch):
        """Return prompts that a decode ends at the context; without a filler they are computed here, once."""
        made = [self.prompt(context - TOKENS) for _ in range(batch)]
        if not self.plan["fill"]:
            self.enqueue(made, 1)
            self.run()
        return made

    def requests_that_fit(self, context):
        """Return how many requests of a context run at once, and whether only `max_num_seqs` limits them."""
        most = self.config.scheduler_config.max_num_seqs
        wanted = min(most, int(1.3 * self.concurrency(context)) + 8)
        self.enqueue([self.prompt(context - SETTLED) for _ in range(wanted)], SETTLED, "fill")
        for _ in range(2):
            self.llm.llm_engine.step()
        running = len(self.core.scheduler.running)
        self.abort()
        return running, running == most

    def concurrency(self, context):
        """Return how many requests of this many tokens vLLM counts on: what it logs as the maximum concurrency."""
        from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

        config = copy.copy(self.config)
        config.model_config = copy.copy(config.model_config)
        config.model_config.max_model_len = context
        return get_max_concurrency_for_kv_cache_config(config, self.core.scheduler.kv_cache_config)

    def environment(self):
        return engine_environment(self.core)

    def memory(self):
        """Return the most bytes that PyTorch held, and the bytes in use, on the GPU with the most; nothing on a CPU."""
        if not self.cuda:
            return None
        ranks = self.core.model_executor.collective_rpc(worker_memory)
        return {name: max(rank[name] for rank in ranks) for name in ranks[0]}


def not_the_baseline(environment):
    """Return why this engine is no baseline of 16 bit; None if it is one."""
    if (environment["compute_capability"] or [0])[0] != 9:  # Hopper
        return None
    if environment["backend_names"] == ["FLASH_ATTN"] and environment["flash_attention"] == 3:
        return None
    used, version = ", ".join(environment["backend_names"]), environment["flash_attention"]
    with_version = f"FlashAttention {version}" if version else "no FlashAttention"
    return f"the bf16 baseline runs on {used} with {with_version}: on Hopper it must be FLASH_ATTN with FlashAttention 3"


def not_ours(environment):
    """Return why this engine does not measure ElasticKV; None if it does."""
    if any(name.startswith("elastickv.") for name in environment["backends"]):
        return None
    return f"vLLM took {', '.join(environment['backends'])} instead of ElasticKV's backend: is the plug-in installed?"


def measure(plan, recorder, began):
    """Measure one contender."""
    imported = time.time()
    engine = Engine(plan)
    environment = engine.environment()
    recorder.save(startup_s=time.time() - began, engine_s=time.time() - imported, environment=environment)
    if plan["baseline"] and (reason := not_the_baseline(environment)):
        recorder.save(refused=reason)
        return 2
    if plan["ours"] and (reason := not_ours(environment)):
        raise RuntimeError(reason)
    capacity = [(context, engine.concurrency(context)) for context in plan["capacities"]]
    rows = [{"context": context, "tokens": context * count, "requests": count} for context, count in capacity]
    recorder.save(capacity=rows)
    if plan["fill"]:
        engine.enqueue([engine.prompt(SAMPLE_TOKENS)], SETTLED, "source")
        engine.run()
    for context, batch in plan["cells"]:
        try:
            prompts = engine.prompts(context, batch)
            samples = recorder.sample(f"{context}x{batch}", partial(engine.step_ms, context, prompts))
        except NotTogether:  # which is noted
            continue
        if samples:
            recorder.record["steps"].append({"context": context, "batch": batch, "samples_ms": samples})
        recorder.save()
        if samples and plan["ours"]:
            recorder.record["steps"][-1]["reads"] = reads_of_cell(engine, recorder, context, batch, prompts)
            recorder.save()
    if plan["throughput"]:
        recorder.save(throughput=throughput(engine, recorder, plan["capacity"]))
    if plan["first_token"]:
        context = plan["first_token"]
        samples = recorder.sample("first token", partial(engine.seconds_to_first_token, context), _OF_SLOW)
        if samples:
            recorder.save(first_token={"context": context, "samples_s": samples})
    recorder.save(memory=engine.memory(), done=True)
    return 0


def reads_of_cell(engine, recorder, context, batch, prompts):
    """Return what decodes of a cell read; None where that was not counted."""
    try:
        reads = recorder.sample(f"{context}x{batch}, bytes", partial(engine.reads, context, prompts), share=0)
    except NotTogether:  # which is noted
        return None
    return reads[0] if reads else None


def throughput(engine, recorder, context):
    """Return steps with as many requests of a context as fit; None where they cannot be timed."""
    try:
        requests, limited = engine.requests_that_fit(context)
    except Exception as error:
        recorder.failed("throughput", error)
        return None
    if limited:
        recorder.record["not_measured"].append(
            f"throughput: more than {requests} requests may fit, max_num_seqs allows no more"
        )
    for _ in range(_FEWER_REQUESTS):
        prompts = engine.prompts(context, requests)
        try:
            samples = recorder.sample("throughput", partial(engine.step_ms, context, prompts), _OF_SLOW)
        except NotTogether:
            requests -= max(1, requests // 100)
            continue
        return {"context": context, "requests": requests, "samples_ms": samples} if samples else None
    return None


def main():
    began = float(os.environ.get("SERVING_BEGAN") or time.time())
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    recorder = Recorder(sys.argv[2], plan, began)
    recorder.save()
    import vllm  # noqa: F401 - so that `engine_s` does not count it

    try:
        status = measure(plan, recorder, began)
    except Exception as error:
        traceback.print_exc()
        recorder.save(error=said(error))
        status = 1
    sys.stdout.flush()
    # An engine that is torn down by the interpreter may hang: all is written.
    os._exit(status)


if __name__ == "__main__":
    exit_with(main)
