"""vLLM's schedulers, but a request whose logits are NaN ends with an error, and its blocks are taken from the prefix cache.

Requests may also ask for a ratio of their own (`request_ratios`): what is no such ratio ends the request with an error, too.
What decodes read is counted for vLLM's metrics (`metrics`).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from elastickv.backends.bad_token import BadToken
from elastickv.errors import UsageError
from elastickv.vllm.bad_tokens import of_engine
from elastickv.vllm.metrics.read_counter import ReadCounter
from elastickv.vllm.metrics.read_metrics import attach
from elastickv.vllm.metrics.served_reads import served_reads
from elastickv.vllm.selection.request_ratios import RequestRatios

_log = logging.getLogger("vllm.elastickv")


class _FailOnNan(Scheduler):
    """Ends requests with NaN in their logits before vLLM looks at the tokens that were chosen by them.

    vLLM counts NaN and only reports them. With drafts it counts by row of logits, of which a request has several, but keeps
    as many counts as there are requests: those of a request behind others with drafts are lost. Tokens that could not be stored
    are therefore asked for themselves (`BadTokens.take`), which has an answer where this process runs the model too.
    """

    _in_flight: Sequence[tuple[int, Any]] = ()  # numbers of steps that have not been updated from, and what they compute
    # Of requests that lost their blocks while a step of theirs was in flight: the blocks of each group, with their hashes.
    _lost: Mapping[str, Sequence[Sequence[tuple[int, Any]]]] = MappingProxyType({})
    _refused: Sequence[Request] = ()  # ended, and not reported yet
    reads: ReadCounter | None = None
    """Counts what decodes read; None where vLLM's statistics are off."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.log_stats:
            self.reads = self.read_counter()

    def read_counter(self) -> ReadCounter:
        """Return a counter of what decodes read, for requests that come from now on."""
        reads = served_reads(self.vllm_config, self.kv_cache_config)
        return ReadCounter(reads, 1 + self.num_spec_tokens, self._ratios.ratio, chunks_list=current_platform.is_cpu())

    @cached_property
    def _ratios(self) -> RequestRatios:
        return RequestRatios(self.vllm_config.additional_config, self.num_spec_tokens)

    def make_stats(self, *arguments: Any, **options: Any) -> Any:
        """Return vLLM's statistics with what decodes have read since the last ones; None where there are none."""
        stats = super().make_stats(*arguments, **options)
        if stats is not None and self.reads is not None:
            attach(stats, self.reads.take())
        return stats

    def add_request(self, request: Request) -> None:
        """Take a request; one whose ratio is not accepted ends in the next step."""
        super().add_request(request)
        try:
            self._ratios.add(request)
        except UsageError as error:
            _log.error("ElasticKV: request %s is refused: %s", request.request_id, error)
            ended = super().finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)
            self._refused = [*self._refused, *ended]

    def has_requests(self) -> bool:
        """Whether a step is needed: also to report a request that was refused."""
        return bool(self._refused) or super().has_requests()

    def schedule(self, *arguments: Any, **options: Any) -> Any:
        """Return what the next step computes."""
        output = super().schedule(*arguments, **options)
        blocks_of, groups = self.kv_cache_manager.get_block_ids, self.kv_cache_config.kv_cache_groups
        self._ratios.attach(output, self.requests, groups, blocks_of)
        tokens = of_engine(self.vllm_config)
        # After a fault that vLLM recovers from, outputs of some steps never come.
        most = self.vllm_config.max_concurrent_batches
        self._in_flight = [*self._in_flight[-most:], (0 if tokens is None else tokens.begin_step(), output)]
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, EngineCoreOutputs]:
        """Return the outputs of a step; requests that fail in it have no token and the finish reason 'error'."""
        # An output that vLLM makes up for a connector's sake is of no step.
        steps = [number for number, output in self._in_flight if output is scheduler_output]
        self._in_flight = [each for each in self._in_flight if each[1] is not scheduler_output]
        if self.reads is not None and steps:
            self.reads.count(scheduler_output, self._computed(scheduler_output))
        tokens, bad = of_engine(self.vllm_config), dict[int, BadToken]()
        if tokens is not None and steps:
            bad = tokens.take(steps[0])
        failed: list[Request] = []
        if bad or any((model_runner_output.num_nans_in_logits or {}).values()):
            failed = self._fail(self._suspects(scheduler_output, model_runner_output, bad))
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        failed, self._refused = [*failed, *self._refused], ()
        for request in failed:
            last = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(last)
        if self._lost:
            self._lost = {name: blocks for name, blocks in self._lost.items() if name in self._scheduled}
        return outputs

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> Any:
        """End requests; a step in flight may still report tokens of theirs, which other requests have read."""
        names = [request_ids] if isinstance(request_ids, str) else list(self.requests if request_ids is None else request_ids)
        self._remember_blocks(names)
        return super().finish_requests(None if request_ids is None else names, finished_status)

    def _preempt_request(self, request: Request, *arguments: Any, **options: Any) -> None:
        self._remember_blocks([request.request_id])
        super()._preempt_request(request, *arguments, **options)

    @property
    def _scheduled(self) -> set[str]:
        """Requests of the steps in flight."""
        return {name for _, output in self._in_flight for name in output.num_scheduled_tokens}

    def _remember_blocks(self, names: Sequence[str]) -> None:
        blocks = self.kv_cache_manager.block_pool.blocks
        for name in self._scheduled.intersection(names) & self.requests.keys():
            groups = self.kv_cache_manager.get_block_ids(name)
            self._lost = {**self._lost, name: [[(block, blocks[block].block_hash) for block in group] for group in groups]}

    def _computed(self, scheduler_output: Any) -> dict[str, range]:
        """Return which tokens of each request a step computed.

        vLLM schedules as if all drafts in flight were accepted. Once the outputs of the steps before have come, the last token
        that is known is the first of a step that decodes. Of a request that has ended since, it is what was scheduled.
        """
        cached = scheduler_output.scheduled_cached_reqs
        begun = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        begun |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        most_rejected = self.num_spec_tokens * self.vllm_config.max_concurrent_batches
        tokens = dict[str, range]()
        for name, first in begun.items():
            if name in self.requests:
                first = min(first, max(0, first - most_rejected, self.requests[name].num_tokens - 1))
            tokens[name] = range(first, first + scheduler_output.num_scheduled_tokens[name])
        return tokens

    def _suspects(self, scheduler_output: Any, model_runner_output: Any, bad: Mapping[int, BadToken]) -> dict[str, int]:
        """Return the requests of a step that fail, with the first token of each that may be bad."""
        computed = self._computed(scheduler_output)
        suspects = _with_bad_tokens(scheduler_output, model_runner_output, computed, bad)
        for name in self._with_nan(scheduler_output, model_runner_output):
            suspects.setdefault(name, computed[name].start)
        return {name: token for name, token in suspects.items() if name in self.requests or name in self._lost}

    def _with_nan(self, scheduler_output: Any, model_runner_output: Any) -> Iterator[str]:
        """Yield requests of which a row of logits has NaN that is not a rejected draft's."""
        counts, names = model_runner_output.num_nans_in_logits or {}, _in_order(model_runner_output)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        if not drafts or getattr(self.parallel_config, "enable_batch_sharded_sampling", False):
            yield from (name for name in names if counts.get(name))
            return
        by_row, row = [counts.get(name, 0) for name in names], 0
        for index, name in enumerate(names):
            if any(by_row[row : row + _accepted(model_runner_output, index)]):
                yield name
            row += 1 + len(drafts.get(name, ()))

    def _fail(self, suspects: dict[str, int]) -> list[Request]:
        """End requests, each bad from a token on, and those that read their blocks through the prefix cache; return them.

        None of their blocks serves another hit: beside a request's first token that cannot be stored there may be others.
        """
        names = set(suspects)
        bad, failing = set[int](), set[str]()
        while suspects:
            failing |= set(suspects)
            for name, token in suspects.items():
                bad |= self._blocks_from(name, token)
            read = {name: self._first_of(name, bad) for name in self.requests if name not in failing}
            suspects = {name: token for name, token in read.items() if token is not None}
        self.kv_cache_manager.evict_blocks(bad.union(*(self._blocks_from(name, 0) for name in failing)))
        ended: list[Request] = self.finish_requests(failing & self.requests.keys(), RequestStatus.FINISHED_ERROR)
        for request in ended:
            why = "its logits are NaN" if request.request_id in names else "it read blocks of a request whose logits are NaN"
            _log.error("ElasticKV: request %s ends with an error: %s", request.request_id, why)
        return ended

    @property
    def _block_tokens(self) -> list[int]:
        return [group.kv_cache_spec.block_size for group in self.kv_cache_config.kv_cache_groups]

    def _blocks_from(self, name: str, token: int) -> set[int]:
        """Return a request's blocks from a token on, without the null block, and those it lost that still hold its tokens."""
        groups, lost = self.kv_cache_manager.get_block_ids(name), self._lost.get(name, ())
        pool = self.kv_cache_manager.block_pool.blocks
        held = {
            block for size, group in zip(self._block_tokens, groups, strict=True) for block in group[token // size :] if block
        }
        return held | {
            block
            for size, group in zip(self._block_tokens, lost, strict=False)
            for block, content in group[token // size :]
            if block and content is not None and pool[block].block_hash == content
        }

    def _first_of(self, name: str, bad: set[int]) -> int | None:
        """Return the first token of a request's that is in bad blocks, or None."""
        groups = zip(self._block_tokens, self.kv_cache_manager.get_block_ids(name), strict=True)
        return min((i * size for size, blocks in groups for i, block in enumerate(blocks) if block in bad), default=None)


def _in_order(model_runner_output: Any) -> list[str]:
    """Return the requests of a step in the order of the model's batch."""
    indices = model_runner_output.req_id_to_index
    return sorted(indices, key=indices.__getitem__)


def _with_bad_tokens(
    scheduler_output: Any, model_runner_output: Any, computed: Mapping[str, range], bad: Mapping[int, BadToken]
) -> dict[str, int]:
    """Return the requests of a step with a token that could not be stored, and the token; rejected drafts do not count."""
    names, tokens = _in_order(model_runner_output), dict[str, int]()
    for index, token in bad.items():
        name = names[index]
        drafts = len(scheduler_output.scheduled_spec_decode_tokens.get(name, ()))
        rejected = 1 + drafts - _accepted(model_runner_output, index) if drafts else 0
        if token.position < computed[name].stop - rejected:
            tokens[name] = token.position
    return tokens


def _accepted(model_runner_output: Any, index: int) -> int:
    """Return how many rows of logits of a request gave a token; at least the first is no draft's."""
    chosen = model_runner_output.sampled_token_ids
    return max(1, len(chosen[index]) if index < len(chosen) else 0)


class FailOnNanScheduler(_FailOnNan):
    """vLLM's scheduler, but requests with NaN in their logits end with an error."""


class FailOnNanAsyncScheduler(_FailOnNan, AsyncScheduler):
    """vLLM's asynchronous scheduler, but requests with NaN in their logits end with an error."""
