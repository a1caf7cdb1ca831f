"""SnapKV: the prompt's tokens that its last ones attend to, with pooling, chosen once.

Li et al. 2024 (arXiv 2404.14469); FasterDecoding/SnapKV, `snapkv/monkeypatch/snapkv_utils.py`: the last 32 tokens of the prompt
are the window and stay; their attention to the tokens before is summed and averaged over 5 neighbors, zeros beyond the ends.
Where query heads share a KV head, their scores are averaged (issue 22 there); the publication's code repeats keys.
"""

import torch

from elastickv.evaluation.kv_selections.one_off_eviction import OneOffEviction
from elastickv.evaluation.kv_selections.reference_selection import LayerPrompt
from elastickv.evaluation.prefill import Tensor

WINDOW = 32
POOLED = 5


class SnapKV(OneOffEviction):
    """The window and the tokens that it attends to most."""

    name = "snapkv"
    source = "SnapKV (arXiv 2404.14469), FasterDecoding/SnapKV"
    least = WINDOW + 1

    def prompt_scores(self, size: int, prompt: LayerPrompt) -> Tensor:
        """Return the pooled attention of the window; the window's own tokens are above all others."""
        tokens = prompt.keys.shape[2]
        before = max(0, tokens - WINDOW)
        attention = prompt.weights(before, tokens)[..., :before].sum(2)
        scores = attention.new_full((attention.shape[0], tokens), float("inf"))
        if before:
            pooled = torch.nn.functional.avg_pool1d(attention, POOLED, stride=1, padding=POOLED // 2)
            scores[:, :before] = pooled.mean(1)
        return scores
