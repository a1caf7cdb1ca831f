"""Eviction once, at the end of the prompt: the tokens with the best scores stay, and so do all that follow."""

from elastickv.evaluation.kv_selections.reference_selection import LayerSelection, PromptScoredSelection, token_bytes
from elastickv.evaluation.prefill import Tensor


class _Remaining(LayerSelection):
    def __init__(self, size: int, scores: Tensor) -> None:
        best = scores.topk(min(size, scores.shape[2]), dim=-1).indices
        self._remaining = scores.new_zeros(scores.shape, dtype=bool).scatter_(2, best, True)

    def select(self, query: Tensor, keys: Tensor) -> Tensor:
        chosen = keys.new_ones(keys.shape[:3], dtype=bool)
        chosen[..., : self._remaining.shape[2]] = self._remaining
        return chosen


class OneOffEviction(PromptScoredSelection):
    """`size` tokens of the prompt, and all tokens after it."""

    def read_bytes(self, size: int, tokens: int, prompt: int, head_dim: int) -> int:
        """Return the bytes of the tokens that were not evicted."""
        return (min(size, prompt) + tokens - prompt) * token_bytes(head_dim)

    stored_bytes = read_bytes

    def layer(self, size: int, prompt_scores: Tensor | None) -> LayerSelection:
        """Return what a layer's scores leave."""
        return _Remaining(size, prompt_scores)
