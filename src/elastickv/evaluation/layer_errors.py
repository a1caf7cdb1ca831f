"""Measure the error of one layer's heads when cold keys and values are quantized, and when only some pages are read.

Everything derives from exact attention: exponentials of scores are summed page by page once, and any selection of pages is then
a sum over some of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from elastickv.kvcache.quantize import INT4_LEVELS, quantize_int4_keys, stored_values
from elastickv.kvcache.scorers.bounds import SPAN
from elastickv.recipe.formats import value_groups
from elastickv.recipe.recipe import DEFAULT_SINKS, DEFAULT_WINDOW
from elastickv.recipe.regions import PAGE_TOKENS, selected

Tensor: TypeAlias = Any  # torch.Tensor: the type checker does not follow PyTorch
KEY_FORMATS = ("int8", "fp8", "int4")


@dataclass(frozen=True)
class LayerInputs:
    """The inputs of one layer's attention for one sequence, float32 on one device.

    Attributes
    ----------
    queries : (query_heads, positions, head_dim), those at `positions`.
    keys, values : (kv_heads, tokens, head_dim).
    projection : (hidden, query_heads * head_dim), W_o.
    residual : (positions,) ||residual stream||^2 at the layer's input.
    positions : (positions,) int64; query i sees tokens 0 .. positions[i].
    scaling : factor on q.k.
    softcap : scores become softcap * tanh(score / softcap); None for none.
    sink_logits : (query_heads,) scores that only take part in the normalizer; None for none.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    projection: Tensor
    residual: Tensor
    positions: Tensor
    scaling: float
    softcap: float | None = None
    sink_logits: Tensor | None = None


@dataclass(frozen=True)
class LayerErrors:
    """Errors of the KV heads of one layer, means over positions; keys as in `recipe.ModelCalibration`."""

    pages: dict[int, dict[float, list[float]]]
    keys: dict[str, list[float]]
    values: dict[str, list[float]]


def value_formats(head_dim: int) -> list[str]:
    """Return the formats of V to measure, int4 with each group of channels."""
    return ["int8", "fp8", *(f"int4/{group}" for group in value_groups(head_dim))]


def layer_errors(
    inputs: LayerInputs,
    fractions: Sequence[float],
    schedules: Sequence[int],
    run: int,
    sinks: int = DEFAULT_SINKS,
    window: int = DEFAULT_WINDOW,
) -> LayerErrors:
    """Measure one layer.

    Parameters
    ----------
    fractions : shares of the cold pages.
    schedules : steps from one anchor to the next.
    run : length of the runs of consecutive positions; each run begins with an anchor.
    """
    kv_heads, _, head_dim = inputs.keys.shape
    pages: dict[int, dict[float, list[float]]] = {steps: {f: [] for f in fractions} for steps in schedules}
    keys: dict[str, list[float]] = {name: [] for name in KEY_FORMATS}
    values: dict[str, list[float]] = {name: [] for name in value_formats(head_dim)}
    for number in range(kv_heads):
        head = _Head(inputs, number, sinks, window)
        for steps in schedules:
            for fraction in fractions:
                error = 0.0 if fraction == 1 else head.error(head.read(head.listed(fraction, steps, run)))
                pages[steps][fraction].append(error)
        for name, row in keys.items():
            row.append(head.error(head.attend(head.stored(inputs.keys[number], name, False, head_dim), head.values)))
        for name, row in values.items():
            fmt, _, group = name.partition("/")
            row.append(
                head.error(head.attend(head.keys, head.stored(inputs.values[number], fmt, True, int(group or head_dim))))
            )
    return LayerErrors(pages, keys, values)


class _Head:
    """One KV head with the query heads that read it."""

    def __init__(self, inputs: LayerInputs, number: int, sinks: int, window: int) -> None:
        group = len(inputs.queries) // len(inputs.keys)
        mine = slice(number * group, (number + 1) * group)
        head_dim = inputs.keys.shape[-1]
        self.inputs, self.sinks = inputs, sinks
        self.queries, self.keys, self.values = inputs.queries[mine], inputs.keys[number], inputs.values[number]
        self.sink_logits = None if inputs.sink_logits is None else inputs.sink_logits[mine]
        columns = inputs.projection[:, mine.start * head_dim : mine.stop * head_dim]
        self.gram = columns.T @ columns
        contexts = inputs.positions + 1
        # (positions,) cold pages that each query has.
        self.cold = ((contexts - sinks - window) // PAGE_TOKENS).clamp_min(0)
        self.pages = int(self.cold.max())
        self.cold_tokens = slice(sinks, sinks + self.pages * PAGE_TOKENS)
        self.weights = self._weights(self.keys)
        self.total = self._total(self.weights)
        self.full = self.weights @ self.values / self.total
        cold = self.weights[..., self.cold_tokens].unflatten(-1, (self.pages, PAGE_TOKENS))
        paged = self.values[self.cold_tokens].unflatten(0, (self.pages, PAGE_TOKENS))
        self.page_weight = cold.sum(-1)
        self.page_output = torch.einsum("gnpt,ptd->gnpd", cold, paged)
        self.rank = self._rank()

    def _weights(self, keys: Tensor) -> Tensor:
        """Return (group, positions, tokens) exponentials of the scores, relative to each query's largest in exact attention."""
        scores = (self.queries @ keys.T) * self.inputs.scaling
        if self.inputs.softcap is not None:
            scores = self.inputs.softcap * torch.tanh(scores / self.inputs.softcap)
        tokens = torch.arange(len(keys), device=keys.device)
        scores = scores.masked_fill(tokens > self.inputs.positions[:, None], -torch.inf)
        if not hasattr(self, "top"):
            self.top = scores.amax(-1, keepdim=True)
        return (scores - self.top).exp()

    def _total(self, weights: Tensor) -> Tensor:
        """Return the (group, positions, 1) normalizer."""
        total = weights.sum(-1, keepdim=True)
        if self.sink_logits is not None:
            total = total + (self.sink_logits[:, None, None] - self.top).exp()
        return total

    def _rank(self) -> Tensor:
        """Return (positions, pages): 0 for the page that scores best, as `kvcache.scorers.bounds` scores."""
        _, scales, zeros = quantize_int4_keys(self.keys[self.cold_tokens].unflatten(0, (self.pages, PAGE_TOKENS)).cpu().numpy())
        s, z = (torch.from_numpy(plane.astype("float32")).to(self.keys) for plane in (scales, zeros))
        signed, size = self.queries.sum(0), self.queries.abs().sum(0)
        scores = signed @ z.T + INT4_LEVELS / 2 * ((signed + SPAN * size) @ s.T)
        scores = scores.masked_fill(~self._is_cold(self.cold), -torch.inf)
        return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)

    def _is_cold(self, cold: Tensor) -> Tensor:
        return torch.arange(self.pages, device=cold.device) < cold[:, None]

    def listed(self, fraction: float, steps: int, run: int) -> Tensor:
        """Return (positions, pages): whether a step reads a page, selected at its anchor or cold only since then."""
        here = torch.arange(len(self.cold), device=self.cold.device)
        anchor = here - here % run % steps
        counts = torch.tensor([selected(int(pages), fraction) for pages in self.cold], device=self.cold.device)
        chosen = (self.rank < counts[:, None])[anchor]
        return chosen | (self._is_cold(self.cold) & ~self._is_cold(self.cold[anchor]))

    def read(self, listed: Tensor) -> Tensor:
        """Return the (group, positions, head_dim) outputs that leave out the cold pages not `listed`."""
        left_out = (self._is_cold(self.cold) & ~listed).to(self.page_weight)
        total = self.total[..., 0] - (self.page_weight * left_out).sum(-1)
        output = self.full * self.total - torch.einsum("gnpd,np->gnd", self.page_output, left_out)
        return output / total.clamp_min(torch.finfo(total.dtype).tiny)[..., None]

    def stored(self, rows: Tensor, fmt: str, value: bool, group: int) -> Tensor:
        """Return rows with the tokens that are cold for the last query read back from a format."""
        cold = stored_values(rows[self.cold_tokens].cpu().numpy(), fmt, value, group)
        return torch.cat([rows[: self.sinks], torch.from_numpy(cold).to(rows), rows[self.cold_tokens.stop :]])

    def attend(self, keys: Tensor, values: Tensor) -> Tensor:
        """Return the (group, positions, head_dim) outputs of all tokens with other keys and values."""
        weights = self.weights if keys is self.keys else self._weights(keys)
        return weights @ values / (self.total if keys is self.keys else self._total(weights))

    def error(self, outputs: Tensor) -> float:
        """Return the mean over positions of ||W_o change||^2 / ||residual||^2."""
        change = (outputs - self.full).permute(1, 0, 2).flatten(1)
        squares = ((change @ self.gram) * change).sum(-1).clamp_min(0)
        return float((squares / self.inputs.residual).mean())
