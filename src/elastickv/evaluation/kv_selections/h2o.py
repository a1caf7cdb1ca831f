"""H2O: the newest tokens, and the older ones that have been attended to most so far.

Zhang et al. 2023 (arXiv 2306.14048); FMInference/H2O, `h2o_hf/utils_real_drop/modify_llama.py`. Attention is summed over all
queries, the prompt's included. After each step all but half of the cache for the newest tokens and half for heavy hitters is
evicted for good. Where query heads share a KV head, their attention is summed. Tokens have their position in the text.
"""

import torch

from elastickv.evaluation.kv_selections.reference_selection import (
    LayerPrompt,
    LayerSelection,
    PromptScoredSelection,
    token_bytes,
)
from elastickv.evaluation.prefill import Tensor

_CHUNK = 256  # queries whose attention is in memory at once
_SCORE_BYTES = 4


class _HeavyHitters(LayerSelection):
    def __init__(self, size: int, scores: Tensor) -> None:
        self._size, self._scores = size, scores.float()
        self._alive = scores.new_ones(scores.shape, dtype=bool)
        self._evict()

    def select(self, query: Tensor, keys: Tensor) -> Tensor:
        own = torch.nn.functional.pad(self._alive, (0, 1), value=True)
        self._alive = own
        return own

    def attended(self, weights: Tensor) -> None:
        self._scores = torch.nn.functional.pad(self._scores, (0, 1)) + weights.sum(2)
        self._evict()

    def _evict(self) -> None:
        """Leave a token less than a step reads: room for its own."""
        tokens, room = self._scores.shape[2], self._size - 1
        if int(self._alive[0, 0].sum()) <= room:
            return
        newest = room // 2
        older = self._scores[..., : tokens - newest].masked_fill(~self._alive[..., : tokens - newest], float("-inf"))
        heavy = older.topk(room - newest, dim=-1).indices
        alive = torch.zeros_like(self._alive).scatter_(2, heavy, True)
        alive[..., tokens - newest :] = True
        self._alive = alive


class HeavyHitterOracle(PromptScoredSelection):
    """`size` tokens a step, its own included, each with a float32 sum of attention."""

    name = "h2o"
    source = "H2O (arXiv 2306.14048), FMInference/H2O"
    least = 3

    def read_bytes(self, size: int, tokens: int, prompt: int, head_dim: int) -> int:
        """Return the bytes of the tokens in the cache, and of the sums of all but the step's own."""
        held = min(size, tokens)
        return held * token_bytes(head_dim) + (held - 1) * _SCORE_BYTES

    def stored_bytes(self, size: int, tokens: int, prompt: int, head_dim: int) -> int:
        """Return the bytes of the tokens in the cache and of their sums."""
        return min(size, tokens) * (token_bytes(head_dim) + _SCORE_BYTES)

    def layer(self, size: int, prompt_scores: Tensor | None) -> LayerSelection:
        """Return what a layer's prompt leaves."""
        return _HeavyHitters(size, prompt_scores)

    def prompt_scores(self, size: int, prompt: LayerPrompt) -> Tensor:
        """Return the attention that each token gets from all queries of the prompt."""
        tokens = prompt.keys.shape[2]
        parts = (prompt.weights(first, min(first + _CHUNK, tokens)).sum((1, 2)) for first in range(0, tokens, _CHUNK))
        return sum(parts, torch.zeros((), device=prompt.keys.device))
