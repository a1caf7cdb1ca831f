"""Tokens whose keys or values cannot be stored: found on the device, named in the log."""

import logging
from typing import Any

import torch

from elastickv.backends.bad_token import NO_BAD_TOKEN, BadToken

_log = logging.getLogger("vllm.elastickv")
_MOST_LAYERS = 1024
_STEPS = 8  # from one look at the device's words to the next


class BadTokens:
    """One word a layer, in which kernels leave the first token with a NaN, an infinity or a key that is too large.

    `look` never waits for the device: it copies the words, and reads the copy some steps later.

    Parameters
    ----------
    device : where the kernels run.
    """

    def __init__(self, device: str) -> None:
        self._device, self._layers = device, dict[str, torch.Tensor]()
        self._words: torch.Tensor | None = None
        self._copy = torch.full((_MOST_LAYERS,), NO_BAD_TOKEN, dtype=torch.int64, device="cpu", pin_memory=device != "cpu")
        self._copied: Any = torch.cuda.Event() if device != "cpu" else None
        self._steps = 0

    def word(self, layer: str) -> torch.Tensor:
        """Return the word of a layer, (1,) int64.

        The first call allocates them, while vLLM measures memory: what is allocated with the weights is lost when vLLM sleeps.
        """
        if self._words is None:
            with torch.inference_mode(False):
                self._words = torch.full((_MOST_LAYERS,), NO_BAD_TOKEN, dtype=torch.int64, device=self._device)
        if layer not in self._layers:
            number = len(self._layers)
            self._layers[layer] = self._words[number : number + 1]
        return self._layers[layer]

    def look(self) -> None:
        """Log what was found; called once a step."""
        self._steps += 1
        if self._words is None or self._steps % _STEPS or (self._copied is not None and not self._copied.query()):
            return
        for layer, word in zip(self._layers, self._copy.tolist(), strict=False):
            token = BadToken.of(word)
            if token is not None:
                _log.error(
                    "ElasticKV: layer %s has %s at position %d of a request: its answer is wrong from there on",
                    layer,
                    token.reason,
                    token.position,
                )
        if (self._copy != NO_BAD_TOKEN).any():
            self._words.fill_(NO_BAD_TOKEN)
        self._copy.copy_(self._words, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
