"""How the next token of each row is chosen: the most likely one, or one that is sampled with reproducible random numbers."""

from collections.abc import Collection

import numpy as np
import torch

from elastickv.evaluation.generations.continuation_options import ContinuationOptions
from elastickv.evaluation.prefill import Tensor


def most_likely(logits: Tensor) -> Tensor:
    """Return the (rows,) most likely tokens of (rows, vocabulary) logits."""
    return logits.argmax(-1)


class TokenChoice:
    """Chooses a token a row, step by step: greedily in the first row of each window, sampled in its others.

    Sampling adds Gumbel noise to the scaled logits and takes the largest sum (Maddison et al. 2014, arXiv 1411.0030). The noise
    depends on seed, window, sample and step alone: two caches with the same logits choose the same tokens, and the more their
    logits differ, the sooner do the texts. On another device random numbers are others.
    """

    def __init__(self, options: ContinuationOptions, windows: int, device: torch.device) -> None:
        self._options = options
        each = 1 + options.samples
        # Numbers of rows, where a mask would make the host wait for the device.
        self._sampled_rows = torch.tensor([row for row in range(windows * each) if row % each], dtype=torch.long, device=device)
        self._generators = [
            torch.Generator(device).manual_seed(_row_seed(options.seed, window, sample))
            for window in range(windows)
            for sample in range(options.samples)
        ]

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the (rows,) tokens chosen from (rows, vocabulary) float32 logits on the device."""
        chosen = logits.argmax(-1)
        if self._generators:
            chosen[self._sampled_rows] = self._sampled(logits[self._sampled_rows])
        return chosen

    def _sampled(self, logits: Tensor) -> Tensor:
        scaled = logits / self._options.temperature
        if self._options.top_p < 1:
            scaled = nucleus(scaled, self._options.top_p)
        noise = torch.empty_like(scaled)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        # The logarithm of an exponential variable, negated, is a Gumbel variable.
        return (scaled - noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()).argmax(-1)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Return logits with -inf outside of the smallest set of tokens whose probability is at least `top_p`."""
    ordered, order = logits.sort(-1, descending=True)
    probabilities = ordered.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    outside[..., 0] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter_(-1, order, outside), -torch.inf)


def _row_seed(*parts: int) -> int:
    """Return a seed of 63 bits for a row: those of neighboring rows have nothing in common."""
    (state,) = np.random.SeedSequence(parts).generate_state(1, np.uint64)
    return int(state >> np.uint64(1))


def texts_of(generated: Tensor, ends: Collection[int]) -> list[list[int]]:
    """Return the ids of each row of (rows, tokens) up to its first end token, which is the last of them."""
    texts = []
    for ids in generated.tolist():
        end = next((number + 1 for number, token in enumerate(ids) if token in ends), len(ids))
        texts.append(ids[:end])
    return texts
