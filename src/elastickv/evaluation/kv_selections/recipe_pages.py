"""The pages that a recipe selects, read in 16 bit: what its selection loses without its formats.

Pages are ranked as `kvcache.scorers.bounds` ranks them, by scales and zeros that are not rounded to 16 bit. Anchors are those
of the cache that decodes.
"""

from functools import partial

import torch

from elastickv.evaluation.kv_formats.rotations import by_blocks, hadamard
from elastickv.evaluation.kv_selections.reference_selection import LayerSelection, token_bytes
from elastickv.evaluation.prefill import Tensor
from elastickv.evaluation.recipes_by_ratio import Span
from elastickv.kvcache.hadamard import rotated_block
from elastickv.kvcache.quantize import INT4_LEVELS
from elastickv.kvcache.scorers.bounds import SPAN
from elastickv.recipe import AttentionShape, Recipe, step_bytes
from elastickv.recipe.regions import PAGE_TOKENS, regions, selected


class RecipePages(LayerSelection):
    """What a layer's recipe reads, step after step: from the prompt's last state on, one call of `select` a step."""

    def __init__(self, recipe: Recipe, anchor_offset: int) -> None:
        self._recipe, self._anchor_offset = recipe, anchor_offset
        self._step = -1
        self._chosen: Tensor = None  # (rows, kv_heads, pages) of the last anchor
        self._zeros: Tensor = None
        self._scales: Tensor = None

    def select(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return the tokens of the pages that are read, and all exact ones."""
        self._step += 1
        recipe, split = self._recipe, regions(keys.shape[2], self._recipe.sinks, self._recipe.window)
        pages = split.cold // PAGE_TOKENS
        if not recipe.steps_since_refresh(self._step, self._anchor_offset):
            self._chosen = self._best(query, keys[:, :, split.sinks : split.sinks + split.cold], pages)
        # Pages that became cold since the anchor are read too.
        read = torch.nn.functional.pad(self._chosen, (0, pages - self._chosen.shape[2]), value=True)
        chosen = keys.new_ones(keys.shape[:3], dtype=bool)
        chosen[..., split.sinks : split.sinks + split.cold] = read.repeat_interleave(PAGE_TOKENS, dim=2)
        return chosen

    def _best(self, query: Tensor, cold: Tensor, pages: int) -> Tensor:
        self._note_scales(cold, pages)
        query = self._as_stored(query)
        signed, size = query.sum(2, keepdim=True), query.abs().sum(2, keepdim=True)
        middle = INT4_LEVELS / 2 * (signed + SPAN * size)
        scores = (signed @ self._zeros.mT + middle @ self._scales.mT)[:, :, 0]
        rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        counts = [selected(pages, self._recipe.fraction(head)) for head in range(cold.shape[1])]
        return rank < torch.tensor(counts, device=cold.device)[:, None]

    def _as_stored(self, rows: Tensor) -> Tensor:
        """Return queries or keys in the channels by which the recipe ranks pages."""
        return by_blocks(rows, hadamard(rotated_block(rows.shape[-1]))) if self._recipe.rotates_keys else rows

    def _note_scales(self, cold: Tensor, pages: int) -> None:
        """Add the zeros and scales of pages that became cold."""
        noted = 0 if self._zeros is None else self._zeros.shape[2]
        if pages > noted or self._zeros is None:
            paged = self._as_stored(cold[:, :, noted * PAGE_TOKENS :]).unflatten(2, (pages - noted, PAGE_TOKENS))
            zeros = paged.amin(3)
            scales = (paged.amax(3) - zeros) / INT4_LEVELS
            joined = partial(torch.cat, dim=2)
            self._zeros = zeros if self._zeros is None else joined([self._zeros, zeros])
            self._scales = scales if self._scales is None else joined([self._scales, scales])


def read_bytes(recipe: Recipe, span: Span, shape: AttentionShape, dtype: str) -> int:
    """Return the bytes that one layer reads over a span: pages and exact tokens in 16 bit, and what scoring and lists take."""
    total = 0.0
    for step in range(span.steps):
        tokens, since = span.first + step + 1, recipe.steps_since_refresh(step)
        total += shape.kv_heads * regions(tokens, recipe.sinks, recipe.window).exact * token_bytes(shape.head_dim)
        total += pages_read(recipe, tokens, since, shape.kv_heads) * PAGE_TOKENS * token_bytes(shape.head_dim)
        of_recipe = step_bytes(recipe, [tokens], shape, dtype, since)
        total += of_recipe.scoring + of_recipe.lists
    return int(total)


def pages_read(recipe: Recipe, tokens: int, since: int, kv_heads: int) -> int:
    """Return the cold pages that a step reads in all heads of a layer, `since` steps after an anchor."""
    cold, at_anchor = (regions(n, recipe.sinks, recipe.window).cold // PAGE_TOKENS for n in (tokens, tokens - since))
    return sum(selected(at_anchor, recipe.fraction(head)) + cold - at_anchor for head in range(kv_heads))
