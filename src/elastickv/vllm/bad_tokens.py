"""Tokens whose keys or values cannot be stored: found on the device, named in the log, and their requests made to fail."""

import logging
import os
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from elastickv.backends.bad_token import NO_BAD_TOKEN, REPORTED_STEPS, BadToken

_log = logging.getLogger("vllm.elastickv")
_COUNT_NANS = "VLLM_COMPUTE_NANS_IN_LOGITS"
_SECONDS = 0.2  # from one look to the next while no step is computed
_of_layers: "weakref.WeakValueDictionary[int, BadTokens]" = weakref.WeakValueDictionary()


class BadTokens:
    """One word a request, in which kernels leave its first token with a NaN, an infinity or a key that is too large.

    The last layer of each step empties the words into the host's memory, and makes the outputs of the tokens' requests NaN:
    vLLM counts NaN in logits by request. `fail_on_nan_scheduler` ends such requests, and where it runs in the process of the
    model those of the tokens that it takes here, which vLLM's counts miss beside drafts. The host never waits for the device.

    Parameters
    ----------
    device : where the kernels run.
    requests : the most that a step has.
    layers : the layers of an engine's configuration (`static_forward_context`), by which `of_engine` knows it. Its
        `instance_id` changes while an engine starts in a process of its own.

    Attributes
    ----------
    words : (2, requests) int64: of the model's layers, which fail requests, and of a drafter's, which do not.
    step : () int32, on the device: the step's number, as `begin_step` counted.
    reported : (4, 2, requests) int64 in the host's memory, page-locked for a GPU: words of step s at s modulo 4, until `look`
        has logged them.
    """

    words: torch.Tensor
    step: torch.Tensor

    def __init__(self, device: str, requests: int, layers: Mapping[str, Any] | None = None) -> None:
        self._device, self._layers, self._drafter = device, dict[str, int](), set[str]()
        self._to_fail = [dict[int, BadToken]() for _ in range(REPORTED_STEPS)]
        self._begun = self._marked = 0
        shape, pinned = (REPORTED_STEPS, 2, requests), device != "cpu"
        self.reported = torch.full(shape, NO_BAD_TOKEN, dtype=torch.int64, device="cpu", pin_memory=pinned)
        self._seen, self._looking = self.reported.numpy(), threading.Lock()
        self._engine_layers = layers  # held, so that no other object gets its identity
        _of_layers[id(layers)] = self

    def of_layer(self, name: str) -> tuple[int, torch.Tensor]:
        """Return the number of a layer, counted in the order in which they are asked for, and its words, (requests,).

        The first call allocates the words, while vLLM measures memory: what is allocated with the weights is lost when vLLM
        sleeps.
        """
        if not self._layers:
            with torch.inference_mode(False):
                self.words = torch.full(self.reported.shape[1:], NO_BAD_TOKEN, dtype=torch.int64, device=self._device)
                self.step = torch.full((), self._marked, dtype=torch.int32, device=self._device)
            if self._device != "cpu":  # whose last layer looks itself
                threading.Thread(target=_look_often, args=(weakref.ref(self),), name="elastickv-log", daemon=True).start()
        return self._layers.setdefault(name, len(self._layers)), self.words[int(name in self._drafter)]

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
            names = list(self._layers)
            for at in zip(*(self._seen != NO_BAD_TOKEN).nonzero(), strict=True):
                token, (row, of_drafter, request) = BadToken.of(int(self._seen[at])), at
                self._seen[at] = NO_BAD_TOKEN
                assert token is not None
                if not of_drafter:
                    self._to_fail[row][int(request)] = token
                _log.error(
                    "ElasticKV: layer %s has %s at position %d of a request, %s",
                    names[token.layer],
                    token.reason,
                    token.position,
                    "whose drafts are wrong" if of_drafter else "which ends with an error",
                )


def of_engine(config: Any) -> BadTokens | None:
    """Return the bad tokens of the engine with a configuration of vLLM's; None where another process runs its model."""
    return _of_layers.get(id(config.compilation_config.static_forward_context))


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
