"""Tokens whose keys or values cannot be stored: found on the device, named in the log, and their requests made to fail."""

import logging
import os
import threading
import time
import weakref

import torch

from elastickv.backends.bad_token import NO_BAD_TOKEN, REPORTED_STEPS, BadToken

_log = logging.getLogger("vllm.elastickv")
_COUNT_NANS = "VLLM_COMPUTE_NANS_IN_LOGITS"
_SECONDS = 0.2  # from one look to the next while no step is computed
_of_engine: "weakref.WeakValueDictionary[str, BadTokens]" = weakref.WeakValueDictionary()


class BadTokens:
    """One word a request, in which kernels leave its first token with a NaN, an infinity or a key that is too large.

    The last layer of each step empties the words into the host's memory, and makes the outputs of the tokens' requests NaN:
    vLLM counts NaN in logits by request. `fail_on_nan_scheduler` ends such requests, and where it runs in the process of the
    model those of the tokens that it takes here, which vLLM's counts miss beside drafts. The host never waits for the device.

    Parameters
    ----------
    device : where the kernels run.
    requests : the most that a step has.
    engine : vLLM's `instance_id` of the engine's configuration.

    Attributes
    ----------
    words : (requests,) int64, of the requests of the step that is computed.
    step : () int32, on the device: the step's number, as `begin_step` counted.
    reported : (4, requests) int64 in the host's memory, page-locked for a GPU: words of step s in row s modulo 4, until `look`
        has logged them.
    """

    words: torch.Tensor
    step: torch.Tensor

    def __init__(self, device: str, requests: int, engine: str = "") -> None:
        self._device, self._layers, self._drafter = device, list[str](), set[str]()
        self._to_fail = [dict[int, BadToken]() for _ in range(REPORTED_STEPS)]
        _of_engine[engine] = self
        self._begun = self._marked = 0
        pinned = device != "cpu"
        self.reported = torch.full((REPORTED_STEPS, requests), NO_BAD_TOKEN, dtype=torch.int64, device="cpu", pin_memory=pinned)
        self._seen, self._looking = self.reported.numpy(), threading.Lock()

    def layer(self, name: str) -> int:
        """Return the number of a layer: layers are numbered in the order in which they are asked for.

        The first call allocates the words, while vLLM measures memory: what is allocated with the weights is lost when vLLM
        sleeps.
        """
        if not self._layers:
            with torch.inference_mode(False):
                self.words = torch.full(self.reported.shape[1:], NO_BAD_TOKEN, dtype=torch.int64, device=self._device)
                self.step = torch.full((), self._marked, dtype=torch.int32, device=self._device)
            if self._device != "cpu":  # whose last layer looks itself
                threading.Thread(target=_look_often, args=(weakref.ref(self),), name="elastickv-log", daemon=True).start()
        if name not in self._layers:
            self._layers.append(name)
        return self._layers.index(name)

    def add_drafter(self, layer: str) -> None:
        """Note that a layer is a drafter's: bad tokens there spoil drafts, and no request."""
        self._drafter.add(layer)

    def begin_step(self) -> int:
        """Return the number of a step that is scheduled now. The model computes it before the next is scheduled."""
        self._begun = (self._begun + 1) % 2**30
        self.look()
        self._to_fail[self._begun % REPORTED_STEPS].clear()  # of no step that is still computed
        return self._begun

    def mark_step(self) -> None:
        """Tell kernels that run from now on which step they are of."""
        if self._marked != self._begun:
            self._marked = self._begun
            if self._layers:
                self.step.fill_(self._begun)

    def take(self, step: int) -> dict[int, BadToken]:
        """Return the tokens of a step for which requests have to fail, by the requests' places in its batch."""
        self.look()
        row = step % REPORTED_STEPS
        tokens, self._to_fail[row] = self._to_fail[row], {}
        return tokens

    def look(self) -> None:
        """Log what was found since the last look."""
        with self._looking:
            for row, request in zip(*(self._seen != NO_BAD_TOKEN).nonzero(), strict=True):
                token = BadToken.of(int(self._seen[row, request]))
                self._seen[row, request] = NO_BAD_TOKEN
                assert token is not None
                layer = self._layers[token.layer]
                if layer not in self._drafter:
                    self._to_fail[row][int(request)] = token
                _log.error(
                    "ElasticKV: layer %s has %s at position %d of a request, %s",
                    layer,
                    token.reason,
                    token.position,
                    "whose drafts are wrong" if layer in self._drafter else "which ends with an error",
                )


def begin_step(engine: str) -> int:
    """Return the number of a step that an engine schedules now; 0 where another process runs its model."""
    tokens = _of_engine.get(engine)
    return 0 if tokens is None else tokens.begin_step()


def take_bad_tokens(engine: str, step: int) -> dict[int, BadToken]:
    """Return what `BadTokens.take` says of an engine's step; nothing where another process runs its model."""
    tokens = _of_engine.get(engine)
    return {} if tokens is None else tokens.take(step)


def _look_often(reference: "weakref.ref[BadTokens]") -> None:
    """Look until the words are gone: what the last step before a pause leaves has no later step to log it."""
    while True:
        time.sleep(_SECONDS)
        tokens = reference()
        if tokens is None:
            return
        tokens.look()
        del tokens


def count_nans() -> None:
    """Let vLLM count NaN in logits in this process, which runs the model, unless the environment says something else.

    Called before a sampler is made. A process whose second engine this is remembers the environment of the first.
    """
    from vllm import envs

    os.environ.setdefault(_COUNT_NANS, "1")
    envs.disable_envs_cache()
