"""vLLM's engine in this process, stepped by the test, with a record of what each token could read when it was computed."""

import contextlib
import gc
import os
from dataclasses import dataclass, field

import numpy as np

PAGE_TOKENS = 32
DEFAULTS = {
    "dtype": "float32",
    "block_size": 32,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 2048,
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "async_scheduling": False,
    "disable_log_stats": False,
    "seed": 0,
}


@dataclass
class Answer:
    """What the engine said to one request.

    Attributes
    ----------
    tokens, logprobs : of the answer; log-probabilities of the chosen tokens.
    cached : tokens of the prompt that were not computed again.
    window_first : for each token of the sequence that was computed, the first token that had a block of the window then.
    before_preemptions : the same for each time that the request lost its blocks: what its tokens were chosen with until then.
    preemptions : how often that was.
    """

    prompt: list
    tokens: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    cached: int = 0
    window_first: np.ndarray | None = None
    before_preemptions: list = field(default_factory=list)
    preemptions: int = 0

    @property
    def sequence(self):
        """Tokens that were computed: all but the last."""
        return self.prompt + self.tokens[:-1]


class WindowRecord:
    """For each token of each request, the first token that had a block of the window in the step that computed it.

    The record follows the blocks: a token that a prefix hit brings was computed for another request.
    """

    def __init__(self, scheduler):
        self.scheduler, self.manager = scheduler, scheduler.kv_cache_manager
        groups = scheduler.kv_cache_config.kv_cache_groups
        sizes = [(group.kv_cache_spec.block_size, getattr(group.kv_cache_spec, "sliding_window", None)) for group in groups]
        self.pages = next(i for i, (_, window) in enumerate(sizes) if window is None)
        self.windows = {i: size for i, (size, window) in enumerate(sizes) if window is not None}
        self.exact_tokens = max((window for _, window in sizes if window), default=1)
        self.page_tokens = sizes[self.pages][0]
        self.by_block, self.by_request, self.preemptions, self.before = {}, {}, {}, {}
        self.by_text = {}  # tokens up to the end of a page -> its record, for pages that a connector brings back
        self.window_blocks = {}  # block -> its first token
        self.steps = 0
        self.schedule, scheduler.schedule = scheduler.schedule, self.scheduled

    def scheduled(self, *arguments, **options):
        output = self.schedule(*arguments, **options)
        self.steps += 1
        for name, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            if request.num_preemptions > self.preemptions.get(name, 0):
                self.before.setdefault(name, []).append(self.by_request[name])
            self.preemptions[name] = request.num_preemptions
            start = request.num_computed_tokens - count
            if name not in self.by_request and self.scheduler.connector is not None:
                self.bring_back(name, list(request.all_token_ids[:start]))
            self.note(name, start, count)
            self.note_text(name, list(request.all_token_ids[: start + count]), start)
        return output

    def note(self, name, start, count):
        blocks = self.manager.get_blocks(name).blocks
        first = max(
            [first_token(blocks[group], size, start, self.exact_tokens) for group, size in self.windows.items()], default=0
        )
        for group, size in self.windows.items():
            self.window_blocks |= {block.block_id: i * size for i, block in enumerate(blocks[group]) if not block.is_null}
        size, pages = self.page_tokens, blocks[self.pages]
        for block in pages:  # of the window once, before it was freed
            self.window_blocks.pop(block.block_id, None)
        for token in range(start, start + count):
            self.by_block.setdefault(pages[token // size].block_id, np.zeros(size, int))[token % size] = first
        used = [self.by_block[block.block_id] for block in pages[: -(-(start + count) // size)]]
        self.by_request[name] = np.concatenate(used)[: start + count]

    def note_text(self, name, tokens, start):
        """Note by their text the pages that a step completes of a prompt: an answer's last tokens may still be in flight."""
        size = self.page_tokens
        for end in range((start // size + 1) * size, len(tokens) + 1, size):
            block = self.manager.get_blocks(name).blocks[self.pages][end // size - 1]
            self.by_text[tuple(tokens[:end])] = self.by_block[block.block_id].copy()

    def bring_back(self, name, tokens):
        """Find the record of the pages that a connector has brought, which are in other blocks now."""
        pages, size = self.manager.get_blocks(name).blocks[self.pages], self.page_tokens
        for end in range(size, len(tokens) + 1, size):
            self.by_block[pages[end // size - 1].block_id] = self.by_text[tuple(tokens[:end])].copy()


def first_token(blocks, size, start, exact_tokens):
    """Return the first token that a step from `start` on reads from the window, in whole pages; 0 if all blocks are there."""
    block, oldest = -(-start // size), max(0, start - exact_tokens + 1) // size
    while block > oldest and not blocks[block - 1].is_null:
        block -= 1
    page = -(-block * size // PAGE_TOKENS)
    return min(page, start // PAGE_TOKENS) * PAGE_TOKENS if block > oldest else 0


def let_vllm_scan_modules():
    """Make llvmlite's library say that it has no `__dict__`.

    vLLM 0.32 on CPUs reads `__dict__` of everything in every module when an engine starts, and llvmlite's library, which is
    there once Numba is, answers any name with a function.
    """
    from llvmlite.binding import ffi

    library = type(ffi.lib)
    function = library.__getattr__
    if function.__module__ != __name__:

        def attribute(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return function(self, name)

        library.__getattr__ = attribute


@contextlib.contextmanager
def set_variables(environment):
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def read_counters(metrics):
    """Return ElasticKV's counters among vLLM's metrics by their names without vLLM's prefix, ranks of data together."""
    sums = {}
    for metric in metrics:
        _, ours, name = metric.name.partition("vllm:elastickv_")
        if ours:
            sums[name] = sums.get(name, 0) + metric.value
    return sums


class ServingEngine:
    """One engine. Options are those of `vllm.LLM`; `elastickv` are those of the plug-in, None for the stock backend.

    `environment` are variables that vLLM reads when an engine starts, and keeps from then on.
    """

    def __init__(self, folder, elastickv=None, environment=None, **options):
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_DO_NOT_TRACK="1")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] = "1"
        from vllm import LLM
        from vllm.compilation.monitor import set_cudagraph_capturing_enabled
        from vllm.v1.attention import selector

        let_vllm_scan_modules()
        # What an engine before left behind: model runner V1 forbids graphs once it has captured its own, and the backend was
        # selected without regard to `additional_config`.
        set_cudagraph_capturing_enabled(True)
        selector._cached_get_attn_backend.cache_clear()
        settings = DEFAULTS | options
        if elastickv is not None:
            settings["additional_config"] = {"elastickv": elastickv}
        with set_variables(environment or {}):
            self.llm = LLM(model=str(folder), **settings)
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.record = WindowRecord(self.scheduler)
        self.count = 0

    @property
    def free_blocks(self):
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def steps(self):
        return self.record.steps

    @property
    def managers(self):
        return self.scheduler.kv_cache_manager.coordinator.single_type_managers

    @property
    def window_block_tokens(self):
        return next(iter(self.record.windows.values()))

    def counter(self, name):
        """Return a counter of the engine's metrics."""
        return next(metric.value for metric in self.llm.get_metrics() if metric.name == name)

    def reads(self):
        """Return the counters of what decodes read."""
        return read_counters(self.llm.get_metrics())

    @property
    def runner_module(self):
        """The module of the model runner."""
        worker = self.core.model_executor.driver_worker
        return type(getattr(worker, "worker", worker).model_runner).__module__

    @property
    def capacity(self):
        """Tokens of KV cache that the engine reports."""
        return self.engine.vllm_config.cache_config.kv_cache_size_tokens

    def evict_windows(self, before=None):
        """Take the window's blocks of tokens `before` a position, or all, from the prefix cache."""
        blocks = {block for block, token in self.record.window_blocks.items() if before is None or token < before}
        self.scheduler.kv_cache_manager.evict_blocks(blocks)

    def forget_prefixes(self):
        assert self.llm.reset_prefix_cache()
        self.record.window_blocks.clear()

    def add(self, prompt, tokens, **sampling):
        """Add a request; return its name. `lora` is a folder with an adapter."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        settings = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, "logprobs": 0, "detokenize": False}
        settings["output_kind"] = RequestOutputKind.FINAL_ONLY
        lora = sampling.pop("lora", None)
        if lora is not None:
            from vllm.lora.request import LoRARequest

            lora = LoRARequest("adapter", 1, str(lora))
        self.count += 1
        name = f"request-{self.count}"
        params = SamplingParams(**(settings | sampling))
        self.engine.add_request(name, {"prompt_token_ids": list(prompt)}, params, lora_request=lora)
        return name

    def settle(self):
        """Process what is still in flight: with asynchronous scheduling a step is, when the last request has ended."""
        for _ in range(3):
            self.engine.step()

    def step(self):
        """Compute one step; return the requests that ended: their names with their outputs."""
        return {output.request_id: output for output in self.engine.step() if output.finished}

    def finish(self, names, prompts):
        """Step until all requests have ended; return the answers of `names`."""
        ended = {}
        while self.engine.has_unfinished_requests():
            ended |= self.step()
        return [self.answers(ended[name], prompt)[0] for name, prompt in zip(names, prompts, strict=True)]

    def finish_schedule(self, requests, order, gaps, chunk, aborted=()):
        """Add requests in an order with steps between them, abort some, finish the others; return what ended by its number.

        Parameters
        ----------
        requests : (prompt, tokens of the answer) of each.
        order, gaps : numbers of requests, and how many steps follow when each was added.
        chunk : most tokens of a step.
        aborted : numbers of requests that are aborted when all were added, unless they have ended.
        """
        whole_step, names, ended = self.scheduler.max_num_scheduled_tokens, {}, {}
        self.scheduler.max_num_scheduled_tokens = chunk
        for number, gap in zip(order, gaps, strict=True):
            names[number] = self.add(*requests[number])
            for _ in range(gap):
                ended |= self.step()
        self.engine.abort_request([names[number] for number in aborted if names[number] not in ended])
        while self.engine.has_unfinished_requests():
            ended |= self.step()
        self.scheduler.max_num_scheduled_tokens = whole_step
        return {number: self.answers(ended[name], requests[number][0])[0] for number, name in names.items() if name in ended}

    def answers(self, output, prompt):
        """Return an `Answer` for each sequence of an output."""
        several = len(output.outputs) > 1
        found = []
        for part in output.outputs:
            name = f"{part.index}_{output.request_id}" if several else output.request_id
            logprobs = [row[token].logprob for token, row in zip(part.token_ids, part.logprobs or (), strict=False)]
            found.append(
                Answer(
                    list(prompt),
                    list(part.token_ids),
                    logprobs,
                    output.num_cached_tokens or 0,
                    self.record.by_request[name],
                    self.record.before.get(name, []),
                    self.record.preemptions[name],
                )
            )
        return found

    def generate(self, prompts, tokens, **sampling):
        """Answer prompts together, greedily unless `sampling` says otherwise."""
        return self.finish([self.add(prompt, tokens, **sampling) for prompt in prompts], prompts)

    def close(self):
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.engine.engine_core.shutdown()
        del self.llm, self.engine, self.core, self.scheduler, self.record
        gc.collect()
        cleanup_dist_env_and_memory()
