"""StreamingLLM: the first tokens and the newest ones.

Xiao et al. 2023 (arXiv 2309.17453); mit-han-lab/streaming-llm, `streaming_llm/kv_cache.py`: 4 sinks. Tokens have their position
in the text. The publication counts positions within its cache, which matters beyond a model's longest context.
"""

from elastickv.evaluation.kv_selections.reference_selection import LayerSelection, ReferenceSelection, token_bytes
from elastickv.evaluation.prefill import Tensor

SINKS = 4


class _SinksAndNewest(LayerSelection):
    def __init__(self, size: int) -> None:
        self._size = size

    def select(self, query: Tensor, keys: Tensor) -> Tensor:
        tokens = keys.shape[2]
        chosen = keys.new_zeros(keys.shape[:3], dtype=bool)
        chosen[..., :SINKS] = True
        chosen[..., max(0, tokens - (self._size - SINKS)) :] = True
        return chosen


class StreamingLLM(ReferenceSelection):
    """A cache of `size` tokens, a step's own included."""

    name = "streaming_llm"
    source = "StreamingLLM (arXiv 2309.17453), mit-han-lab/streaming-llm"
    least = SINKS + 1

    def read_bytes(self, size: int, tokens: int, prompt: int, head_dim: int) -> int:
        """Return the bytes of the tokens in the cache."""
        return min(size, tokens) * token_bytes(head_dim)

    stored_bytes = read_bytes

    def layer(self, size: int, prompt_scores: Tensor | None) -> LayerSelection:
        """Return the same for every layer."""
        return _SinksAndNewest(size)
