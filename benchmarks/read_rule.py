"""The read rule of a serving engine, as an attention function of Transformers: `with reading(model, rule): model(ids)`.

A query at position t reads the keys and values of tokens j > t - R exactly, and those of all others as pages store them. A pass
over a whole text gives what an engine gives token by token: as R is at least a page, every token that is read from a page is in
a page that was complete before. The engine's tests read by it too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from elastickv.kvcache.hadamard import rotated
from elastickv.kvcache.quantize import CODECS, stored_values
from elastickv.kvcache.scorers import scale_factor, select_pages
from elastickv.kvcache.scorers.bounds import BOUNDS
from elastickv.recipe import Recipe
from elastickv.recipe.calibration import Smoothing
from elastickv.recipe.formats import PAGE_TOKENS
from elastickv.recipe.regions import selected

IMPLEMENTATION = "elastickv_read_rule"
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class ReadRule:
    """What a query reads.

    Attributes
    ----------
    pages : formats of pages, as a recipe. With a selection, `attend` is told where the prompt ends: later tokens read the first
        page, the best ones of the last anchor, and those that have left the window since.
    anchor_offset : by how many steps anchors come early, as in a cache.
    window : R, the newest tokens that are read exactly.
    sinks : first tokens that are always read exactly; pages begin after them.
    first_page : formats of the first page where they differ from those of the others; 'dense': it is exact.
    page_window : whether all tokens of a page turn old together, when its last one is R tokens old, as in `ElasticCache`.
    smoothing : of keys that are rotated, [KV head][channel], as a calibration has it; None for none.
    rounded : dtype to which keys and values are rounded before anything else; None: they stay as the model computes them.
    """

    pages: Recipe
    window: int = 128
    sinks: int = 0
    first_page: Recipe | None = None
    page_window: bool = False
    smoothing: Smoothing | None = None
    rounded: torch.dtype | None = None
    anchor_offset: int = 0

    def __post_init__(self) -> None:
        if self.window < PAGE_TOKENS:
            raise ValueError(f"window {self.window} is smaller than a page: give {PAGE_TOKENS} or more")

    def stored(self, rows: torch.Tensor, value: bool) -> torch.Tensor:
        """Return keys or values, (kv_heads, tokens, head_dim), as pages store them; an incomplete page as it is."""
        numbers = rows.clone()
        last = self.sinks + (rows.shape[1] - self.sinks) // PAGE_TOKENS * PAGE_TOKENS
        parts = [(self.sinks, last, self.pages)]
        if self.first_page is not None:
            first = min(self.sinks + PAGE_TOKENS, last)
            parts = [(self.sinks, first, self.first_page), (first, last, self.pages)]
        for start, end, recipe in parts:
            fmt = recipe.value_format if value else recipe.key_format
            if end > start and fmt is not None:
                factors = torch.tensor(1.0)
                if self.smoothing is not None and recipe.rotates_keys and not value:
                    factors = torch.tensor(self.smoothing, device=rows.device).float().exp2()[:, None]
                piece = (rows[:, start:end] * factors).reshape(-1, rows.shape[-1]).float().numpy(force=True)
                is_rotated = recipe.rotates_values if value else recipe.rotates_keys
                stored = stored_values(rotated(piece) if is_rotated else piece, fmt, value, recipe.v_group(rows.shape[-1]))
                stored = rotated(stored) if is_rotated else stored
                numbers[:, start:end] = torch.from_numpy(stored).to(rows.device).view(rows.shape[0], end - start, -1) / factors
        return numbers

    def first_exact(self, positions: torch.Tensor, window_first: torch.Tensor | None = None) -> torch.Tensor:
        """Return, for queries at these positions, the first token of the window.

        Parameters
        ----------
        window_first : of each query, the first token whose window block is there; None: all are.
        """
        first = positions + 1 - self.window
        if self.page_window:
            first = self.sinks + torch.div(first - self.sinks, PAGE_TOKENS, rounding_mode="floor") * PAGE_TOKENS
        first = first.clamp(min=self.sinks)
        return first if window_first is None else first.maximum(window_first.minimum(positions))  # its own token is there

    def lists(self, query: torch.Tensor, key: torch.Tensor, prompt: int) -> dict[int, list[list[int]]]:
        """Return the pages that each anchor of a sequence lists: its position -> a list for each KV head.

        Parameters
        ----------
        query, key : (kv_heads, group, tokens, head_dim) and (kv_heads, tokens, head_dim), as `attend` has them.
        prompt : tokens of the prompt, which read every page.
        """
        assert not self.pages.rotates_keys and self.sinks == 0 and not self.page_window, "no such selection is served"
        fmt, tokens = str(self.pages.key_format), key.shape[1]
        whole = key[:, : tokens // PAGE_TOKENS * PAGE_TOKENS].reshape(len(key), -1, PAGE_TOKENS, key.shape[-1])
        stored = [CODECS[fmt].quantize_keys(pages.float().numpy(force=True)) for pages in whole]
        anchors = (t for t in range(prompt, tokens) if not self.pages.steps_since_refresh(t - prompt, self.anchor_offset))
        lists = {}
        for anchor in anchors:
            count = max(0, anchor + 1 - self.window) // PAGE_TOKENS
            lists[anchor] = list[list[int]]()
            for head, (_, scales, zeros) in enumerate(stored):
                scale = scale_factor(fmt) * scales[:count].astype(np.float64)
                scores = BOUNDS.score(query[head, :, anchor].numpy(force=True), scale, zeros[:count])
                scores[:1] = np.inf
                lists[anchor].append(select_pages(scores, selected(count, self.pages.fraction(head))).tolist())
        return lists

    def unread(self, query: torch.Tensor, key: torch.Tensor, prompt: int) -> torch.Tensor:
        """Return which pages tokens do not read: (kv_heads, tokens, pages) of bool. Parameters are those of `lists`."""
        tokens = key.shape[1]
        unread = torch.zeros(len(key), tokens, -(-tokens // PAGE_TOKENS), dtype=torch.bool)
        for anchor, lists in self.lists(query, key, prompt).items():
            count = max(0, anchor + 1 - self.window) // PAGE_TOKENS
            for token in range(anchor, tokens):
                if token - self.pages.steps_since_refresh(token - prompt, self.anchor_offset) != anchor:
                    break
                for head, pages in enumerate(lists):
                    unread[head, token, :count] = True
                    unread[head, token, pages] = False
        return unread

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window_first: torch.Tensor | None = None,
        prompt: int | None = None,
    ) -> torch.Tensor:
        """Return the outputs, (query_heads, tokens, head_dim), of one sequence from its first token on.

        They are computed in float32, as an engine does, or in a finer dtype of the tensors.

        Parameters
        ----------
        query : (query_heads, tokens, head_dim).
        key, value : (kv_heads, tokens, head_dim).
        window_first : (tokens,), as `first_exact` takes it.
        prompt : tokens that read every page; None: all do.
        """
        if self.rounded is not None:
            key, value = (rows.to(self.rounded).to(rows.dtype) for rows in (key, value))
        dtype, (heads, tokens, dim) = query.dtype, query.shape
        query, key, value = (rows.to(torch.promote_types(dtype, torch.float32)) for rows in (query, key, value))
        queries = query.view(len(key), heads // len(key), tokens, dim)
        exact = (key[:, None], value[:, None])
        stored = (self.stored(key, False)[:, None], self.stored(value, True)[:, None])
        outputs = torch.empty_like(queries)
        numbers, unread = torch.arange(tokens, device=query.device), None
        if prompt is not None and self.pages.selection == "pages":
            unread = self.unread(queries, key, prompt).to(query.device)
        for start in range(0, tokens, ROWS_AT_ONCE):
            rows = numbers[start : start + ROWS_AT_ONCE]
            first = self.first_exact(rows, None if window_first is None else window_first[rows])
            old, new = numbers[: int(first.max())], numbers[int(first.min()) : int(rows[-1]) + 1]
            seen = torch.cat([old < first[:, None], new >= first[:, None]], -1) & (torch.cat([old, new]) <= rows[:, None])
            if unread is not None:
                skipped = unread[:, rows][:, :, old // PAGE_TOKENS]
                nothing = torch.zeros(len(key), len(rows), len(new), dtype=torch.bool, device=query.device)
                seen = (seen & ~torch.cat([skipped, nothing], -1))[:, None]
            keys, values = (torch.cat([a[:, :, old], b[:, :, new]], 2) for a, b in zip(stored, exact, strict=True))
            scores = queries[:, :, rows] @ keys.transpose(-1, -2) * scaling
            outputs[:, :, rows] = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
        return outputs.view(heads, tokens, dim).to(dtype)


@contextmanager
def reading(model: Any, rule: ReadRule | Sequence[ReadRule], prompt: int | None = None) -> Iterator[None]:
    """Let a model's attention read by a rule, for whole texts from their first token on; restore it on exit.

    Only for models with plain softmax attention to the whole context in every layer.

    Parameters
    ----------
    rule : of all layers, or one for each.
    prompt : tokens that read every page, as `ReadRule.attend` takes it.
    """

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **rest: Any
    ) -> tuple[torch.Tensor, None]:
        own = rule if isinstance(rule, ReadRule) else rule[module.layer_idx]
        outputs = [own.attend(q, k, v, scaling, prompt=prompt) for q, k, v in zip(query, key, value, strict=True)]
        return torch.stack(outputs).transpose(1, 2), None

    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
