"""Attention of many queries to stored tokens, without a selection: later chunks and turns.

Every query attends to the dequantized values of all stored tokens, and to the new ones up to its own. A layer's tokens are
dequantized together for the framework's fast attention. If that does not support the scoring, or the layer is large, they are
read block by block with a running maximum and sum (Milakov and Gimelshein 2018).
"""

import math
from dataclasses import dataclass

import torch

from elastickv.recipe import Recipe, regions
from elastickv.recipe.regions import retained_tokens
from elastickv.transformers.layer_storage import LayerStorage

BLOCK_TOKENS = 2048
SCORES_AT_ONCE = 1 << 24  # 64 MiB of float32
WHOLE_ELEMENTS = 1 << 26  # of a layer's keys: 256 MiB of float32


@dataclass(frozen=True)
class Scoring:
    """How a model turns products of queries and keys into scores.

    Attributes
    ----------
    scaling : factor on the products.
    softcap : c of c * tanh(score / c), or None.
    sinks : (query_heads,) scores of a sink that holds no value, or None.
    """

    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def scores(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return the scores of (..., queries, head_dim) and (..., keys, head_dim)."""
        products = torch.matmul(queries, keys.transpose(-1, -2)) * self.scaling
        return products if self.softcap is None else torch.tanh(products / self.softcap) * self.softcap

    def with_sinks(self, outputs: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """Return outputs with the sinks' share of the weights removed.

        Parameters
        ----------
        outputs : (batch, query_heads, ..., head_dim).
        lse : log-sum-exp of the scores, (batch, query_heads, ...).
        """
        if self.sinks is None:
            return outputs
        sinks = self.sinks.to(lse.dtype).reshape(1, -1, *([1] * (lse.dim() - 2)))
        return outputs * torch.sigmoid(lse - sinks).unsqueeze(-1)


class _Running:
    """Running output, maximum and sum for queries of shape (batch, kv_heads, group, queries, head_dim)."""

    def __init__(self, queries: torch.Tensor) -> None:
        self.output = torch.zeros_like(queries)
        self.top = torch.full(queries.shape[:-1], -math.inf, dtype=queries.dtype, device=queries.device)
        self.total = torch.zeros_like(self.top)

    def add(self, rows: slice, scores: torch.Tensor, values: torch.Tensor) -> None:
        """Add keys of `scores` (-inf where a query may not see one) and their values to the queries of `rows`."""
        before = self.top[..., rows]
        top = torch.maximum(before, scores.amax(-1))
        # Queries that have seen nothing yet: any finite number does.
        safe = torch.where(torch.isinf(top), torch.zeros_like(top), top)
        weights, fade = torch.exp(scores - safe.unsqueeze(-1)), torch.exp(before - safe)
        self.output[..., rows, :] = self.output[..., rows, :] * fade.unsqueeze(-1) + torch.matmul(weights, values)
        self.total[..., rows] = self.total[..., rows] * fade + weights.sum(-1)
        self.top[..., rows] = top

    def finished(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return outputs, zeros for queries that saw nothing, and log-sum-exps."""
        total = self.total.unsqueeze(-1)
        return torch.where(total > 0, self.output / total, torch.zeros_like(self.output)), self.top + torch.log(self.total)


def attend_stored(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    store: LayerStorage,
    scoring: Scoring,
) -> torch.Tensor:
    """Return the attention of new tokens to stored tokens and to themselves.

    Parameters
    ----------
    queries : (batch, query_heads, new, head_dim).
    keys, values : (batch, kv_heads, new, head_dim), not stored yet.
    visible : (batch or 1, 1, new, new) bool, which new tokens a new query sees. None: those up to its own.
    store : the stored tokens.

    Returns
    -------
    outputs : (batch, query_heads, new, head_dim) float32; zeros for a query that sees nothing.
    """
    batch, heads, new, dim = queries.shape
    kv_heads = keys.shape[1]
    grouped = queries.to(torch.float32).reshape(batch, kv_heads, heads // kv_heads, new, dim)
    lengths = store.lengths
    longest, recipe = int(lengths.max(initial=0)), store.cache.recipe
    ends = torch.as_tensor(lengths, device=queries.device)
    plain = scoring.softcap is None and scoring.sinks is None and recipe.stride == 1
    if plain and batch * kv_heads * (longest + new) * dim <= WHOLE_ELEMENTS:
        return _attend_whole(grouped, keys, values, visible, store, scoring.scaling, ends)
    running = _Running(grouped)
    for first in range(0, longest, BLOCK_TOKENS):
        last = min(first + BLOCK_TOKENS, longest)
        stored_keys, stored_values = (tensor.unsqueeze(2) for tensor in store.read(first, last))
        bias = _stored_bias(recipe, ends, first, last)
        for rows in _slices(new, batch * heads * (last - first)):
            scores = scoring.scores(grouped[..., rows, :], stored_keys)
            running.add(rows, scores + bias[:, None, None, None, :], stored_values)
    own_keys, own_values = (tensor.to(torch.float32).unsqueeze(2) for tensor in (keys, values))
    positions = torch.arange(new, device=queries.device)
    for rows in _slices(new, batch * heads * new):
        seen = positions[None, None, :] <= positions[None, rows, None] if visible is None else visible[:, 0, rows]
        scores = scoring.scores(grouped[..., rows, :], own_keys)
        running.add(rows, scores.masked_fill(~seen[:, None, None], -math.inf), own_values)
    outputs, lse = running.finished()
    return scoring.with_sinks(outputs.reshape(batch, heads, new, dim), lse.reshape(batch, heads, new))


def _attend_whole(
    grouped: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    store: LayerStorage,
    scaling: float,
    ends: torch.Tensor,
) -> torch.Tensor:
    """Attend like `attend_stored` with all keys of the layer at once; `grouped` is (batch, kv_heads, group, new, head_dim)."""
    batch, kv_heads, group, new, dim = grouped.shape
    longest = int(ends.max())
    both = [torch.cat([s, n.to(torch.float32)], dim=2) for s, n in zip(store.read(0, longest), (keys, values), strict=True)]
    held = torch.arange(longest, device=ends.device) < ends[:, None]
    own = torch.ones(1, new, new, dtype=torch.bool, device=ends.device).tril() if visible is None else visible[:, 0]
    outputs = torch.empty_like(grouped)
    for rows in _slices(new, batch * kv_heads * group * (longest + new)):
        count = len(range(new)[rows])
        seen = torch.cat([held[:, None].expand(-1, count, -1), own[:, rows].expand(batch, -1, -1)], dim=2)[:, None]
        # The heads of a group are treated as further queries, so that keys need not be repeated.
        queries = grouped[:, :, :, rows].reshape(batch, kv_heads, group * count, dim)
        mask = seen.repeat(1, 1, group, 1)
        output = torch.nn.functional.scaled_dot_product_attention(queries, *both, attn_mask=mask, scale=scaling)
        # A query that sees nothing is padding.
        output = torch.where(mask.any(-1, keepdim=True), output, torch.zeros_like(output))
        outputs[:, :, :, rows] = output.reshape(batch, kv_heads, group, count, dim)
    return outputs.reshape(batch, kv_heads * group, new, dim)


def _slices(count: int, scores_of_one: int) -> list[slice]:
    size = max(1, SCORES_AT_ONCE // scores_of_one)
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _stored_bias(recipe: Recipe, ends: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Return (batch, last - first): a bias for scores of stored tokens, -inf where a row has none."""
    positions = torch.arange(first, last, device=ends.device)
    bias = torch.zeros(len(ends), last - first, device=ends.device)
    if recipe.stride > 1:
        for row, length in enumerate(ends.tolist()):
            cold = regions(length, recipe.sinks, recipe.window).cold
            number = positions - recipe.sinks
            in_cold = (number >= 0) & (number < cold)
            # A retained token has the weight of itself and the dropped tokens after it.
            bias[row, in_cold] = math.log(cold / retained_tokens(cold, recipe.stride)) if cold else 0.0
            bias[row, in_cold & (number % recipe.stride != 0)] = -math.inf
    return bias.masked_fill(positions[None, :] >= ends[:, None], -math.inf)
