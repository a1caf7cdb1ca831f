"""vLLM's schedulers, but a request whose logits are NaN ends with an error, and its blocks are taken from the prefix cache."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from elastickv.backends.bad_token import BadToken
from elastickv.vllm.bad_tokens import take_bad_tokens

_log = logging.getLogger("vllm.elastickv")


class _FailOnNan(Scheduler):
    """Ends requests with NaN in their logits before vLLM looks at the tokens that were chosen by them.

    vLLM counts NaN and only reports them. With drafts it counts by row of logits, of which a request has several, but keeps
    as many counts as there are requests: those of a request behind others with drafts are lost. Tokens that could not be stored
    are therefore asked for themselves (`take_bad_tokens`), which has an answer where this process runs the model too.
    """

    _in_flight: Sequence[Any] = ()  # outputs of `schedule` whose steps have not been updated from
    _late: Sequence[tuple[BadToken, str]] = ()  # tokens that may be of the step in flight, and whose they are if they are not

    def schedule(self, *arguments: Any, **options: Any) -> Any:
        """Return what the next step computes."""
        output = super().schedule(*arguments, **options)
        self._in_flight = [*self._in_flight, output]
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, EngineCoreOutputs]:
        """Return the outputs of a step; requests that fail in it have no token and the finish reason 'error'."""
        self._in_flight = [each for each in self._in_flight if each is not scheduler_output]
        tokens = take_bad_tokens(self.vllm_config.instance_id)
        failed: list[Request] = []
        if tokens or self._late or any((model_runner_output.num_nans_in_logits or {}).values()):
            failed = self._fail(self._suspects(scheduler_output, model_runner_output, tokens))
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        for request in failed:
            last = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(last)
        return outputs

    @property
    def _most_rejected(self) -> int:
        """Drafts of the steps in flight, all of which may turn out to be rejected."""
        drafts: int = self.num_spec_tokens * self.vllm_config.max_concurrent_batches
        return drafts

    def _widest(self, scheduler_output: Any) -> dict[str, range]:
        """Return which tokens of each request a step may compute: vLLM schedules as if all drafts in flight were accepted."""
        cached = scheduler_output.scheduled_cached_reqs
        begun = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        begun |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        counts = scheduler_output.num_scheduled_tokens
        return {name: range(max(0, latest - self._most_rejected), latest + counts[name]) for name, latest in begun.items()}

    def _computed(self, scheduler_output: Any) -> dict[str, range]:
        """Return which tokens of each request a step computed; of one that has ended since, the most that it can be.

        Once the outputs of the steps before have come, the last token that is known is the first of a step that decodes.
        """
        tokens = self._widest(scheduler_output)
        for name in tokens.keys() & self.requests.keys():
            count = scheduler_output.num_scheduled_tokens[name]
            first = min(tokens[name].stop - count, max(tokens[name].start, self.requests[name].num_tokens - 1))
            tokens[name] = range(first, first + count)
        return tokens

    def _suspects(self, scheduler_output: Any, model_runner_output: Any, reported: Sequence[BadToken]) -> dict[str, int]:
        """Return the requests of a step that fail, with the first token of each that may be bad."""
        computed = self._computed(scheduler_output)
        with_nan = set(self._with_nan(scheduler_output, model_runner_output))
        suspects = self._with_bad_tokens(scheduler_output, model_runner_output, computed, reported, with_nan)
        for name in with_nan:
            suspects.setdefault(name, computed[name].start)
        return {name: token for name, token in suspects.items() if name in self.requests}

    def _with_bad_tokens(
        self,
        scheduler_output: Any,
        model_runner_output: Any,
        computed: Mapping[str, range],
        reported: Sequence[BadToken],
        with_nan: Collection[str] = (),
    ) -> dict[str, int]:
        """Return requests of the step with the first of their tokens that could not be stored; rejected drafts do not count.

        With asynchronous scheduling the next step's tokens may be reported already, by their places in its batch, which come
        with its output. What may be of that step waits, unless the logits of its request here have NaN.
        """
        names, suspects = _in_order(model_runner_output), dict[str, int]()

        def owner(token: BadToken) -> str:
            """Return the request of this step that a token is of, or ''."""
            name = names[token.request] if token.request < len(names) else ""
            tokens = computed.get(name, range(0))
            drafts = len(scheduler_output.scheduled_spec_decode_tokens.get(name, ()))
            count = len(tokens) if not drafts else len(tokens) - drafts + _accepted(model_runner_output, names.index(name)) - 1
            return name if token.position in tokens[:count] else ""

        owned = [(token, owner(token) or earlier) for token, earlier in self._late]
        self._late = late = list[tuple[BadToken, str]]()
        for token in reported:
            name = owner(token)
            ahead = any(token.position in tokens for each in self._in_flight for tokens in self._widest(each).values())
            (late if ahead and name not in with_nan else owned).append((token, name))
        for token, name in owned:
            if name:
                suspects[name] = min(token.position, suspects.get(name, token.position))
        return suspects

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

        None of their blocks serves another hit: of several tokens that cannot be stored only one may have been reported.
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
        ended: list[Request] = self.finish_requests(failing, RequestStatus.FINISHED_ERROR)
        for request in ended:
            why = "its logits are NaN" if request.request_id in names else "it read blocks of a request whose logits are NaN"
            _log.error("ElasticKV: request %s ends with an error: %s", request.request_id, why)
        return ended

    @property
    def _block_tokens(self) -> list[int]:
        return [group.kv_cache_spec.block_size for group in self.kv_cache_config.kv_cache_groups]

    def _blocks_from(self, name: str, token: int) -> set[int]:
        """Return a request's blocks from a token on, without the null block."""
        groups = self.kv_cache_manager.get_block_ids(name)
        return {
            block for size, blocks in zip(self._block_tokens, groups, strict=True) for block in blocks[token // size :] if block
        }

    def _first_of(self, name: str, bad: set[int]) -> int | None:
        """Return the first token of a request's that is in bad blocks, or None."""
        groups = zip(self._block_tokens, self.kv_cache_manager.get_block_ids(name), strict=True)
        return min((i * size for size, blocks in groups for i, block in enumerate(blocks) if block in bad), default=None)


def _in_order(model_runner_output: Any) -> list[str]:
    """Return the requests of a step in the order of the model's batch."""
    indices = model_runner_output.req_id_to_index
    return sorted(indices, key=indices.__getitem__)


def _accepted(model_runner_output: Any, index: int) -> int:
    """Return how many rows of logits of a request gave a token; at least the first is no draft's."""
    chosen = model_runner_output.sampled_token_ids
    return max(1, len(chosen[index]) if index < len(chosen) else 0)


class FailOnNanScheduler(_FailOnNan):
    """vLLM's scheduler, but requests with NaN in their logits end with an error."""


class FailOnNanAsyncScheduler(_FailOnNan, AsyncScheduler):
    """vLLM's asynchronous scheduler, but requests with NaN in their logits end with an error."""
