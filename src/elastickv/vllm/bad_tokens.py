"""Tokens whose keys or values cannot be stored: found on the device, named in the log, and their requests made to fail."""

import logging
import os
import threading
import time
import weakref
from collections import deque

import torch

from elastickv.backends.bad_token import NO_BAD_TOKEN, BadToken

_log = logging.getLogger("vllm.elastickv")
_MOST_LAYERS = 1024
_COUNT_NANS = "VLLM_COMPUTE_NANS_IN_LOGITS"
_SECONDS = 0.2  # from one look to the next while no step is computed
_of_engine: "weakref.WeakValueDictionary[str, BadTokens]" = weakref.WeakValueDictionary()


class BadTokens:
    """One word a layer, in which kernels leave the first token with a NaN, an infinity or a key that is too large.

    The last layer of each step empties the words into the host's memory, and makes the outputs of the tokens' requests NaN:
    vLLM counts NaN in logits by request. `fail_on_nan_scheduler` ends such requests, and where it runs in the process of the
    model those of the tokens that it takes here, which vLLM's counts miss beside drafts. The host never waits for the device.

    Parameters
    ----------
    device : where the kernels run.
    engine : vLLM's `instance_id` of the engine's configuration.

    Attributes
    ----------
    reported : (layers,) int64 in the host's memory, page-locked for a GPU: words of steps before, until `look` has logged them.
    """

    def __init__(self, device: str, engine: str = "") -> None:
        self._device, self._layers, self._drafter = device, dict[str, torch.Tensor](), set[str]()
        self._to_fail: deque[BadToken] = deque(maxlen=_MOST_LAYERS)  # nothing takes them where the scheduler is elsewhere
        _of_engine[engine] = self
        self._words: torch.Tensor | None = None
        self.reported = torch.full((_MOST_LAYERS,), NO_BAD_TOKEN, dtype=torch.int64, device="cpu", pin_memory=device != "cpu")
        self._seen, self._looking = self.reported.numpy(), threading.Lock()

    @property
    def words(self) -> torch.Tensor:
        """The words of all layers, (layers,) int64, in the order in which the layers were asked for."""
        assert self._words is not None
        return self._words[: len(self._layers)]

    def word(self, layer: str) -> torch.Tensor:
        """Return the word of a layer, (1,) int64.

        The first call allocates them, while vLLM measures memory: what is allocated with the weights is lost when vLLM sleeps.
        """
        if self._words is None:
            with torch.inference_mode(False):
                self._words = torch.full((_MOST_LAYERS,), NO_BAD_TOKEN, dtype=torch.int64, device=self._device)
            if self._device != "cpu":  # whose last layer looks itself
                threading.Thread(target=_look_often, args=(weakref.ref(self),), name="elastickv-log", daemon=True).start()
        if layer not in self._layers:
            number = len(self._layers)
            self._layers[layer] = self._words[number : number + 1]
        return self._layers[layer]

    def layers_up_to(self, layer: str) -> int:
        """Return how many layers were asked for up to this one."""
        return list(self._layers).index(layer) + 1

    def add_drafter(self, layer: str) -> None:
        """Note that a layer is a drafter's: bad tokens there spoil drafts, and no request."""
        self._drafter.add(layer)

    def take(self) -> list[BadToken]:
        """Return the tokens since the last call for which their requests have to fail."""
        self.look()
        tokens = []
        while self._to_fail:
            tokens.append(self._to_fail.popleft())
        return tokens

    def look(self) -> None:
        """Log what was found since the last look: of a request the first layer, from which the others have it."""
        with self._looking:
            (layers,) = (self._seen != NO_BAD_TOKEN).nonzero()
            names, requests = list(self._layers), set[tuple[int, bool]]()
            for number in layers.tolist():
                token, of_drafter = BadToken.of(int(self._seen[number])), names[number] in self._drafter
                self._seen[number] = NO_BAD_TOKEN
                if token is None or (token.request, of_drafter) in requests:
                    continue
                requests.add((token.request, of_drafter))
                if not of_drafter:
                    self._to_fail.append(token)
                _log.error(
                    "ElasticKV: layer %s has %s at position %d of a request, %s",
                    names[number],
                    token.reason,
                    token.position,
                    "whose drafts are wrong" if of_drafter else "which ends with an error",
                )


def take_bad_tokens(engine: str) -> list[BadToken]:
    """Return the tokens for which requests of an engine have to fail; none where another process runs its model."""
    words = _of_engine.get(engine)
    return [] if words is None else words.take()


def _look_often(reference: "weakref.ref[BadTokens]") -> None:
    """Look until the words are gone: what the last step before a pause leaves has no later step to log it."""
    while True:
        time.sleep(_SECONDS)
        words = reference()
        if words is None:
            return
        words.look()
        del words


def count_nans() -> None:
    """Let vLLM count NaN in logits in this process, which runs the model, unless the environment says something else.

    Called before a sampler is made. A process whose second engine this is remembers the environment of the first.
    """
    from vllm import envs

    os.environ.setdefault(_COUNT_NANS, "1")
    envs.disable_envs_cache()
