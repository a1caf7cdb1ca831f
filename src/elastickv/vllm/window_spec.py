"""vLLM's description of the window: the newest tokens of every request, in the model's dtype."""

import logging
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import SlidingWindowSpec

_log = logging.getLogger("vllm.elastickv")
_SCHEDULERS = "elastickv.vllm.fail_on_nan_scheduler"
_warned: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class WindowSpec(SlidingWindowSpec):
    """A sliding window whose tokens need no block once a later step cannot read them.

    vLLM's own specification reserves blocks for all tokens in flight, since it stores every token of a prompt chunk. Here a
    token that leaves the window within its chunk is quantized from the chunk itself, so that only windows are reserved.

    Attributes
    ----------
    steps_in_flight : steps that the engine schedules before the first of them is processed.
    rollback_tokens : most draft tokens by which a step's length may turn out too large.
    hit_tokens : prefix hits end at multiples of so many tokens and need the window's blocks before there; 0: they need none of
        them, and tokens whose blocks are gone are read from pages.
    prompt_hits : whether hits that need the window's blocks end within the prompt that stored them. What requests generate is
        computed with selected pages, and as part of a prompt with all of them.
    """

    steps_in_flight: int
    rollback_tokens: int
    hit_tokens: int
    prompt_hits: bool = False

    def first_stored(self, tokens: int) -> int:
        """Return the first token that may be read from the window after a step which ends with `tokens` tokens.

        It is read by later steps, or by requests that repeat all but the last of the tokens.
        """
        end = tokens - self.rollback_tokens
        if self.hit_tokens:
            end = (end - 1) // self.hit_tokens * self.hit_tokens
        return max(0, end - (self.sliding_window - 1))

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Return the bytes that a request may take, and choose the engine's scheduler, which is not made yet.

        Of all that a plug-in provides, vLLM gives its configuration to this alone in the process that schedules.
        """
        choose_scheduler(vllm_config.scheduler_config)
        return int(super().max_memory_usage_bytes(vllm_config))

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Return the most blocks that a request holds: a window for each step in flight and the one before."""
        stock = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        tokens = self.sliding_window - 1 + 2 * self.rollback_tokens + self.hit_tokens
        window = cdiv(tokens, self.block_size) + 1
        return min(stock, (self.steps_in_flight + 1) * window)


def choose_scheduler(scheduler_config: Any) -> None:
    """Let vLLM schedule with the class that ends failing requests, unless the user chose another; any number of times."""
    chosen = scheduler_config.scheduler_cls
    if chosen is None:
        name = "FailOnNanAsyncScheduler" if scheduler_config.async_scheduling else "FailOnNanScheduler"
        scheduler_config.scheduler_cls = f"{_SCHEDULERS}.{name}"
    elif not str(chosen).startswith(_SCHEDULERS) and str(chosen) not in _warned:
        _warned.add(str(chosen))
        _log.warning(
            "ElasticKV: the scheduler is %s, which does not end requests with NaN in keys or values: their answers are wrong",
            chosen,
        )
