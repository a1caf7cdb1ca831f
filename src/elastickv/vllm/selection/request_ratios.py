"""Ratios that single requests ask for, on their way from the scheduler to the process that runs the model.

vLLM hands a plug-in's attention no request: only blocks and lengths. So the scheduler says with each step which blocks belong
to requests with ratios of their own. It is an attribute of vLLM's `SchedulerOutput`, which arrives where that is unpickled.
"""

from collections.abc import Callable, Mapping
from itertools import compress
from types import MappingProxyType
from typing import Any

from elastickv.errors import UsageError
from elastickv.recipe import PAGE_TOKENS
from elastickv.vllm.serving_options import KEY, ServingOptions

ARGUMENT = f"{KEY}_compress"
"""Key of `SamplingParams.extra_args`."""
_ATTRIBUTE = f"{KEY}_ratios"
_of_step: Mapping[int, float] = MappingProxyType({})


def ratios_of_step() -> Mapping[int, float]:
    """Return the ratios of the step that is computed: block of a request's newest page -> its ratio."""
    return _of_step


def newest_blocks(batch: Any) -> Any:
    """Return the block of each request's newest token, (requests,) int32, from vLLM's `CommonAttentionMetadata`."""
    columns = (batch.seq_lens - 1).clamp(min=0) // PAGE_TOKENS
    return batch.block_table_tensor.gather(1, columns[:, None].long())[:, 0]


def _deliver(ratios: Mapping[int, float]) -> "StepRatios":
    global _of_step
    _of_step = ratios
    return StepRatios(ratios)


class StepRatios:
    """Ratios of a step's requests by the blocks of pages that hold their newest tokens; unpickled, they are the step's."""

    def __init__(self, ratios: Mapping[int, float]) -> None:
        self._ratios = ratios

    def __reduce__(self) -> tuple[Callable[..., "StepRatios"], tuple[Mapping[int, float]]]:
        """Return the call that delivers the ratios where the model runs."""
        return _deliver, (self._ratios,)


class RequestRatios:
    """The ratios of an engine's requests, for its scheduler.

    Parameters
    ----------
    additional_config : vLLM's.
    drafts : most draft tokens of a request in a step.
    """

    def __init__(self, additional_config: Any, drafts: int = 0) -> None:
        options = ServingOptions.parse(additional_config) or ServingOptions()
        self._most = options.compress if options.compress is not None and options.select_pages else None
        self._ratios, self._drafts = dict[str, float](), drafts

    def add(self, request: Any) -> None:
        """Take the ratio of a request that has one.

        Raises
        ------
        UsageError : as `check`.
        """
        self.check(request.sampling_params)
        if (ratio := self.ratio(request.sampling_params)) is not None:
            self._ratios[request.request_id] = ratio

    def check(self, sampling_params: Any) -> None:
        """Check the ratio that sampling parameters ask for, if they do.

        Raises
        ------
        UsageError : if it is no number from 1 to the server's ratio.
        """
        passed = _passed(sampling_params)
        if passed is None:
            return
        number = isinstance(passed, (int, float)) and not isinstance(passed, bool)
        if self._most is None and not (number and passed == 1):
            raise UsageError(
                f"{ARGUMENT}={passed!r} and this server selects no pages: leave it out, or start the server with the option "
                "compress"
            )
        if not number or not 1 <= passed <= (self._most or 1):
            raise UsageError(f"{ARGUMENT}={passed!r} is out of range: give a number from 1, every page, to {self._most:g}")

    def ratio(self, sampling_params: Any) -> float | None:
        """Return the ratio that an accepted request's sampling parameters ask for; None: the server's."""
        passed = _passed(sampling_params)
        return None if passed is None or self._most in (None, passed) else float(passed)

    def attach(self, output: Any, requests: Mapping[str, Any], groups: Any, blocks_of: Callable[[str], Any]) -> None:
        """Let a step bring the ratios of its requests to where the model runs.

        Parameters
        ----------
        output : vLLM's `SchedulerOutput`.
        requests : of the scheduler.
        groups : of the caches.
        blocks_of : request -> its blocks of each group.
        """
        if self._most is None:
            return
        self._ratios = {name: ratio for name, ratio in self._ratios.items() if name in requests}
        sizes = [group.kv_cache_spec.block_size for group in groups if _holds_pages(group)]
        # A drafter's pages may be in blocks of another size. The model's are the first, of all groups that vLLM divides them
        # into; a block is in one group alone.
        of_model = [_holds_pages(group) and group.kv_cache_spec.block_size == sizes[0] for group in groups]
        size, ratios = sizes[0], dict[int, float]()
        for name in self._ratios.keys() & output.num_scheduled_tokens.keys():
            # The last token of a prompt is always computed, into a block that is the request's own, as later ones are. Where
            # drafts of the steps in flight are rejected, the newest token comes that much before the end of the blocks.
            own, in_flight = (requests[name].num_prompt_tokens - 1) // size, 4 * (1 + self._drafts)
            of_groups = compress(blocks_of(name), of_model)
            newest = [block for blocks in of_groups for block in blocks[max(own, len(blocks) - 2 - in_flight // size) :]]
            times = size // PAGE_TOKENS  # a block of several pages is as many blocks to the model
            ratios |= {block * times + page: self._ratios[name] for block in newest for page in range(times)}
        setattr(output, _ATTRIBUTE, _deliver(ratios))


def _holds_pages(group: Any) -> bool:
    return getattr(group.kv_cache_spec, "sliding_window", None) is None


def _passed(sampling_params: Any) -> Any:
    return (getattr(sampling_params, "extra_args", None) or {}).get(ARGUMENT)
