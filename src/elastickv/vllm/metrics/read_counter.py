"""Counting what the decodes of an engine read, in the process that schedules them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastickv.vllm.metrics.decode_reads import SERVERS_RATIO, DecodeReads, ReadTotals


@dataclass
class _RequestReads:
    """What a request's reads depend on beside positions.

    Attributes
    ----------
    prompt : tokens of its prompt.
    since : the first token that may have made a list since the request got its blocks; None until it is known.
    ratio : its own, or `SERVERS_RATIO`.
    """

    prompt: int
    since: int | None
    ratio: float


class ReadCounter:
    """Sums of what decodes read, taken from time to time.

    A decode is a request's part of a step that begins with a token that the request generated and has no more tokens than the
    step could have with drafts. Tokens of prompts are not counted, nor is what a preempted request computes again in chunks.

    Parameters
    ----------
    reads : of the engine's model.
    most_tokens : of a decode: one, and its drafts.
    ratio_of : returns the ratio that sampling parameters ask for; None: the server's.
    chunks_list : whether tokens make lists that are computed again in chunks, as on CPUs; else those of decodes alone do.
    """

    def __init__(
        self, reads: DecodeReads, most_tokens: int, ratio_of: Callable[[Any], float | None], chunks_list: bool
    ) -> None:
        self._reads, self._most_tokens, self._ratio_of, self._chunks_list = reads, most_tokens, ratio_of, chunks_list
        self._requests = dict[str, _RequestReads]()
        self._totals = ReadTotals()

    def count(self, output: Any, computed: Mapping[str, range]) -> None:
        """Count a step.

        Parameters
        ----------
        output : vLLM's `SchedulerOutput`, in the order of the steps.
        computed : request -> positions of the tokens that the step computed.
        """
        for name in output.finished_req_ids:
            self._requests.pop(name, None)
        for new in output.scheduled_new_reqs:
            since, ratio = self._since(computed[new.req_id]), self._ratio_of(new.sampling_params)
            self._requests[new.req_id] = _RequestReads(new.prompt_len, since, SERVERS_RATIO if ratio is None else ratio)
        for name in output.scheduled_cached_reqs.resumed_req_ids & self._requests.keys():
            self._requests[name].since = self._since(computed[name])
        parts, ratios = list[tuple[int, int, int, int]](), list[float]()
        for name, tokens in computed.items():
            request = self._requests.get(name)  # none if the output of its first step never came
            if request is not None and request.prompt <= tokens.start and len(tokens) <= self._most_tokens:
                if request.since is None:
                    request.since = tokens.start
                parts.append((tokens.start, len(tokens), request.prompt, request.since))
                ratios.append(request.ratio)
        if not parts:
            return
        first, counts, prompts, since = np.array(parts, np.int64).T
        of_token = np.repeat(np.arange(len(counts)), counts)
        positions = first[of_token] + np.arange(len(of_token)) - (np.cumsum(counts) - counts)[of_token]
        self._totals += self._reads.totals(positions, prompts[of_token], since[of_token], np.array(ratios)[of_token])
        self._totals += ReadTotals(steps=1)

    def _since(self, first_step: range) -> int | None:
        return first_step.start if self._chunks_list else None

    def take(self) -> ReadTotals:
        """Return the sums since the last call."""
        totals, self._totals = self._totals, ReadTotals()
        return totals
