"""Quest: pages of 16 tokens by an upper bound of their scores.

Tang et al. 2024 (arXiv 2406.10774); mit-han-lab/Quest, `evaluation/quest_attention.py` and `quest/utils/controller.py`. The
bound of a page is the sum over channels of max(q * min, q * max) of its keys. The page that is being filled is always read and
is one of the budget, which is at least 3 pages. The first two layers read everything. Where query heads share a KV head, a page
is read for all of them, by the mean of their bounds; the publication's models share none.
"""

import torch

from elastickv.evaluation.kv_selections.reference_selection import LayerSelection, ReferenceSelection, token_bytes
from elastickv.evaluation.prefill import Tensor

PAGE = 16


class _TopPages(LayerSelection):
    """Reads pages by bounds; those of a page are noted once it is complete."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._least: Tensor = None
        self._most: Tensor = None

    def select(self, query: Tensor, keys: Tensor) -> Tensor:
        tokens = keys.shape[2]
        pages = -(-tokens // PAGE)
        chosen = keys.new_ones((*keys.shape[:2], pages), dtype=bool)
        if pages > self._size:
            self._note_bounds(keys, pages - 1)
            best = page_bounds(query, self._least, self._most).mean(2).topk(self._size - 1, dim=-1).indices
            chosen[..., :-1] = False
            chosen.scatter_(2, best, True)
        return chosen.repeat_interleave(PAGE, dim=2)[..., :tokens]

    def _note_bounds(self, keys: Tensor, complete: int) -> None:
        noted = 0 if self._least is None else self._least.shape[2]
        if complete > noted:
            new = keys[:, :, noted * PAGE : complete * PAGE].unflatten(2, (-1, PAGE))
            parts = ((self._least, new.amin(3)), (self._most, new.amax(3)))
            self._least, self._most = (part if old is None else torch.cat([old, part], 2) for old, part in parts)


def page_bounds(query: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """Return upper bounds of the products with any key of a page: (rows, kv_heads, group, pages).

    Parameters
    ----------
    query : (rows, kv_heads, group, head_dim).
    least, most : (rows, kv_heads, pages, head_dim) smallest and largest key of each channel.
    """
    return query.clamp_min(0) @ most.mT + query.clamp_max(0) @ least.mT


class Quest(ReferenceSelection):
    """`size` pages a step, the newest included. A page's smallest and largest keys are as many bytes as a token."""

    source = "Quest (arXiv 2406.10774), mit-han-lab/Quest"
    unit = "pages"
    least = 3

    def __init__(self, name: str, dense_layers: int) -> None:
        self.name, self.dense_layers = name, dense_layers

    def read_bytes(self, size: int, tokens: int, prompt: int, head_dim: int) -> int:
        """Return the bytes of the pages that are read, and of the bounds of all complete ones unless everything is read."""
        pages = -(-tokens // PAGE)
        if pages <= size:
            return tokens * token_bytes(head_dim)
        newest = tokens - (pages - 1) * PAGE
        return ((size - 1) * PAGE + newest + pages - 1) * token_bytes(head_dim)

    def stored_bytes(self, size: int, tokens: int, prompt: int, head_dim: int) -> int:
        """Return the bytes of all tokens, and of all pages' smallest and largest keys."""
        return (tokens - -tokens // PAGE) * token_bytes(head_dim)

    def layer(self, size: int, prompt_scores: Tensor | None) -> LayerSelection:
        """Return the same for every layer that selects."""
        return _TopPages(size)


QUEST = Quest("quest", dense_layers=2)
QUEST_EVERY_LAYER = Quest("quest_every_layer", dense_layers=0)
