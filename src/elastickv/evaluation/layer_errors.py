"""Measure the error of one layer's heads when cold keys and values are quantized, and when only some pages are read.

Everything derives from exact attention: exponentials of scores are summed page by page once, and any selection of pages is then
a sum over some of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from elastickv.evaluation.kv_formats.rotations import by_blocks, hadamard
from elastickv.evaluation.tensor_codecs import TensorCompensation, channel_scales, stored_rows
from elastickv.kvcache.hadamard import rotated_block
from elastickv.kvcache.quantize import INT4_LEVELS
from elastickv.kvcache.scorers.bounds import SPAN
from elastickv.recipe.calibration import GPTQ, MOST_SMOOTHING, ROTATED, Smoothing
from elastickv.recipe.formats import value_groups
from elastickv.recipe.recipe import DEFAULT_SINKS, DEFAULT_WINDOW
from elastickv.recipe.regions import PAGE_TOKENS, selected
from elastickv.recipe.shape import padded_head_dim

Tensor: TypeAlias = Any  # torch.Tensor: the type checker does not follow PyTorch
FEW_BITS = ("int4", "int3", "int2")
_KEY_INTEGERS = ("int8", "int8_per_channel", *FEW_BITS)
KEY_FORMATS = (
    *("fp8", *_KEY_INTEGERS, *(name + ROTATED for name in _KEY_INTEGERS)),
    *(f"int4{GPTQ}", *(name + ROTATED + GPTQ for name in ("int8", *FEW_BITS))),
)


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
    query_products : (kv_heads, head_dim, head_dim), the mean of q q^T over the tokens after the sinks and the query heads of a
        KV head; None: over `queries` alone.
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
    query_products: Tensor | None = None


@dataclass(frozen=True)
class LayerErrors:
    """Errors of the KV heads of one layer, means over positions; keys as in `recipe.ModelCalibration`."""

    pages: dict[int, dict[float, list[float]]]
    keys: dict[str, list[float]]
    values: dict[str, list[float]]


def value_formats(head_dim: int) -> list[str]:
    """Return the formats of V to measure, those of 4 bits and fewer with each group of channels; integers rotated, too.

    Whole heads of them are rounded by Hessians, too, which takes longer to measure.

    Parameters
    ----------
    head_dim : channels of a stored head.
    """
    grouped = [f"{name}/{group}" for name in FEW_BITS for group in value_groups(head_dim)]
    by_hessians = [f"int4/{head_dim}{GPTQ}", *(f"{name}/{head_dim}{ROTATED}{GPTQ}" for name in FEW_BITS)]
    return ["int8", "fp8", *grouped, *(name + ROTATED for name in ("int8", *grouped)), *by_hessians]


def layer_errors(
    inputs: LayerInputs,
    fractions: Sequence[float],
    schedules: Sequence[int],
    run: int,
    smoothing: Smoothing | None = None,
    costs: Sequence[Tensor] | None = None,
    sinks: int = DEFAULT_SINKS,
    window: int = DEFAULT_WINDOW,
) -> LayerErrors:
    """Measure one layer.

    Parameters
    ----------
    fractions : shares of the cold pages.
    schedules : steps from one anchor to the next.
    run : length of the runs of consecutive positions; each run begins with an anchor.
    smoothing : of keys that are rotated, as `ModelCalibration.smoothing_of` has it.
    costs : of errors of keys and of values, as `hessians` returns them; None: those of these inputs.
    """
    kv_heads = len(inputs.keys)
    pages: dict[int, dict[float, list[float]]] = {steps: {f: [] for f in fractions} for steps in schedules}
    keys: dict[str, list[float]] = {name: [] for name in KEY_FORMATS}
    values: dict[str, list[float]] = {name: [] for name in value_formats(padded_head_dim(inputs.values.shape[-1]))}
    regions = _QueryRegions(inputs.positions, inputs.keys.shape[1], sinks, window)
    lists = [(steps, fraction) for steps in schedules for fraction in fractions if fraction != 1]
    of_keys, of_values = hessians(inputs) if costs is None else costs
    stored_keys = {name: regions.stored(inputs.keys, name, False, of_keys, smoothing) for name in keys}
    stored_values = [regions.stored(inputs.values, name, True, of_values) for name in values]
    for number in range(kv_heads):
        head = _Head(inputs, number, regions)
        measured = head.errors(head.without(regions.left_out(head.rank, lists, run))) if lists else []
        of_lists = dict(zip(lists, measured, strict=True))
        for steps in schedules:
            for fraction in fractions:
                pages[steps][fraction].append(of_lists.get((steps, fraction), 0.0))
        for name, row in keys.items():
            row.append(*head.errors(head.with_keys(stored_keys[name][number])))
        of_formats = head.errors(head.with_values([stored[number] for stored in stored_values]))
        for row, error in zip(values.values(), of_formats, strict=True):
            row.append(error)
    return LayerErrors(pages, keys, values)


def key_smoothing(inputs: LayerInputs) -> Smoothing:
    """Return the smoothing of a layer's keys: 2^n is nearest to sqrt(sd(query) / sd(key)).

    A rotation spreads the rounding error of K evenly over its channels, so channels that matter more, those of large queries,
    should be larger before, as in SmoothQuant (Xiao et al. 2023, arXiv 2211.10438). sd(query) is the root mean square over the
    positions and query heads; sd(key) is the standard deviation within pages, because scales of channels are those of a page.
    The mean n of a head is 0. Powers of 2 change no mantissa.
    """
    kv_heads, tokens, head_dim = inputs.keys.shape
    whole = tokens // PAGE_TOKENS * PAGE_TOKENS
    paged = inputs.keys[:, :whole].unflatten(1, (-1, PAGE_TOKENS))
    of_keys = (paged - paged.mean(2, keepdim=True)).square().mean((1, 2))
    of_queries = inputs.queries.reshape(kv_heads, -1, head_dim).square().mean(1)
    least = torch.finfo(torch.float32).tiny
    exponents = (of_queries.clamp_min(least).log2() - of_keys.clamp_min(least).log2()) / 4
    centered = (exponents - exponents.mean(1, keepdim=True)).round().clamp(-MOST_SMOOTHING, MOST_SMOOTHING)
    return tuple(tuple(map(int, head)) for head in centered.tolist())


def hessians(inputs: LayerInputs) -> tuple[Tensor, Tensor]:
    """Return what errors of a layer's keys and values cost, (kv_heads, head_dim, head_dim) each: e H e^T on average.

    Of keys it is E[q q^T], of values W_o^T W_o of the query heads that share them (`kvcache.gptq`).
    """
    kv_heads, _, head_dim = inputs.keys.shape
    columns = inputs.projection.unflatten(1, (kv_heads, -1, head_dim)).permute(1, 0, 2, 3).flatten(1, 2)
    products = mean_products(inputs.queries, kv_heads) if inputs.query_products is None else inputs.query_products
    return products, columns.mT @ columns


def mean_products(queries: Tensor, kv_heads: int) -> Tensor:
    """Return (kv_heads, head_dim, head_dim), the mean of q q^T of (query_heads, positions, head_dim) queries."""
    rows = queries.reshape(kv_heads, -1, queries.shape[-1])
    return rows.mT @ rows / rows.shape[1]


class _QueryRegions:
    """Which tokens each query sees, and which of them are cold: the same for all heads of a layer."""

    def __init__(self, positions: Tensor, tokens: int, sinks: int, window: int) -> None:
        self.sinks = sinks
        # (positions,) cold pages that each query has.
        self._cold = ((positions + 1 - sinks - window) // PAGE_TOKENS).clamp_min(0)
        self.pages = int(self._cold.max())
        self.cold_tokens = slice(sinks, sinks + self.pages * PAGE_TOKENS)
        # (positions, tokens) and (positions, pages).
        self.unseen = torch.arange(tokens, device=positions.device) > positions[:, None]
        self.is_cold = torch.arange(self.pages, device=positions.device) < self._cold[:, None]
        self._counts: dict[float, Tensor] = {}

    def left_out(self, rank: Tensor, lists: Sequence[tuple[int, float]], run: int) -> Tensor:
        """Return (positions, lists, pages): whether a step leaves a page out.

        It reads those that its anchor selected and those that became cold since then.

        Parameters
        ----------
        rank : (positions, pages), 0 for the best page.
        lists : (steps from one anchor to the next, share of the cold pages).
        """
        here = torch.arange(len(rank), device=rank.device)[:, None]
        steps = torch.tensor([steps for steps, _ in lists], device=rank.device)
        anchors = here - here % run % steps  # (positions, lists)
        counts = torch.stack([self._selected(fraction) for _, fraction in lists], 1).gather(0, anchors)
        return self.is_cold[:, None] & self.is_cold[anchors] & (rank[anchors] >= counts[..., None])

    def _selected(self, fraction: float) -> Tensor:
        """Return (positions,) numbers of pages that a step selects of its cold ones; computed once for all heads."""
        if fraction not in self._counts:
            counts = [selected(pages, fraction) for pages in self._cold.tolist()]
            self._counts[fraction] = torch.tensor(counts, device=self._cold.device)
        return self._counts[fraction]

    def stored(self, rows: Tensor, name: str, value: bool, costs: Tensor, smoothing: Smoothing | None = None) -> Tensor:
        """Return (kv_heads, tokens, head_dim) rows with the tokens that are cold for the last query read back from a format.

        Parameters
        ----------
        name : as in `ModelCalibration`. Rotated tensors are rounded to 16 bits once more, all tokens, as a cache stores them.
        costs : (kv_heads, head_dim, head_dim), by which the codes of '+gptq' are chosen.
        smoothing : of channels before a rotation, or None.
        """
        of_format = name.removesuffix(GPTQ)
        plain, mark, _ = of_format.partition(ROTATED)
        fmt, _, group = plain.partition("/")
        known, head_dim = smoothing if mark else None, padded_head_dim(rows.shape[-1])
        added = head_dim - rows.shape[-1]
        compensation = None
        if of_format != name:
            compensation = TensorCompensation.of(torch.nn.functional.pad(costs, (0, added, 0, added)), bool(mark), known)
        matrix = hadamard(rotated_block(head_dim) if mark else 1)
        smooth = rows.new_ones(()) if known is None else torch.tensor(known, device=rows.device).float().exp2()[:, None]
        whole = torch.nn.functional.pad(rows * smooth, (0, added))
        whole = by_blocks(whole, matrix).bfloat16().float() if mark else whole
        cold = whole[:, self.cold_tokens]
        whole[:, self.cold_tokens] = stored_rows(cold, fmt, value, int(group or head_dim), compensation)
        return (by_blocks(whole, matrix) if mark else whole)[..., : rows.shape[-1]] / smooth


class _Head:
    """One KV head with the query heads that read it: its exact attention, and its outputs where something is changed."""

    def __init__(self, inputs: LayerInputs, number: int, regions: _QueryRegions) -> None:
        group = len(inputs.queries) // len(inputs.keys)
        mine = slice(number * group, (number + 1) * group)
        head_dim = inputs.keys.shape[-1]
        self._inputs, self._regions = inputs, regions
        self._queries, self._keys, self._values = inputs.queries[mine], inputs.keys[number], inputs.values[number]
        self._sink_logits = None if inputs.sink_logits is None else inputs.sink_logits[mine]
        columns = inputs.projection[:, mine.start * head_dim : mine.stop * head_dim]
        self._gram = columns.T @ columns
        scores = self._scores(self._keys)
        self._top = scores.amax(-1, keepdim=True)
        self._weights = scores.sub_(self._top).exp_()
        self._total = self._normalizer(self._weights)
        self._full = self._weights @ self._values / self._total
        self.rank = self._rank()

    def _scores(self, keys: Tensor) -> Tensor:
        """Return the (group, positions, tokens) scores."""
        scores = (self._queries @ keys.T).mul_(self._inputs.scaling)
        if self._inputs.softcap is not None:
            scores = self._inputs.softcap * torch.tanh(scores / self._inputs.softcap)
        return scores.masked_fill_(self._regions.unseen, -torch.inf)

    def _normalizer(self, weights: Tensor) -> Tensor:
        """Return the (group, positions, 1) sums of weights, which are relative to each query's largest in exact attention."""
        total = weights.sum(-1, keepdim=True)
        if self._sink_logits is not None:
            total = total + (self._sink_logits[:, None, None] - self._top).exp()
        return total

    def _rank(self) -> Tensor:
        """Return (positions, pages): 0 for the page that scores best, as `kvcache.scorers.bounds` scores."""
        regions = self._regions
        paged = self._keys[regions.cold_tokens].unflatten(0, (regions.pages, PAGE_TOKENS))
        s, z = channel_scales(paged)
        signed, size = self._queries.sum(0), self._queries.abs().sum(0)
        scores = signed @ z.T + INT4_LEVELS / 2 * ((signed + SPAN * size) @ s.T)
        scores = scores.masked_fill(~regions.is_cold, -torch.inf)
        return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)

    def without(self, left_out: Tensor) -> Tensor:
        """Return the (lists, group, positions, head_dim) outputs of all tokens but those of the pages left out.

        Every page's sum is computed once; what a list reads is a product of matrices with these sums. Nothing is subtracted:
        where a page with nearly all of the weight is left out, a difference would be rounding error.
        """
        pages, cold = self._regions.pages, self._regions.cold_tokens
        weights = self._weights[..., cold].unflatten(-1, (pages, PAGE_TOKENS))
        group, positions, head_dim = self._full.shape
        # (pages, group x positions, 32) @ (pages, 32, head_dim), as (positions, pages, group x head_dim).
        by_page = weights.flatten(0, 1).transpose(0, 1) @ self._values[cold].unflatten(0, (pages, PAGE_TOKENS))
        sums = by_page.unflatten(1, (group, positions)).permute(2, 0, 1, 3).flatten(2)
        read = (~left_out).to(sums)
        output = (read @ sums).unflatten(-1, (group, head_dim)).permute(1, 2, 0, 3)
        total = (read @ weights.sum(-1).permute(1, 2, 0)).permute(1, 2, 0)[..., None]
        before, after = self._weights[..., : cold.start], self._weights[..., cold.stop :]
        output = output + before @ self._values[: cold.start] + after @ self._values[cold.stop :]
        total = total + self._normalizer(torch.cat([before, after], -1))
        return output / total.clamp_min(torch.finfo(total.dtype).tiny)

    def with_keys(self, keys: Tensor) -> Tensor:
        """Return the (1, group, positions, head_dim) outputs with other keys."""
        weights = self._scores(keys).sub_(self._top).exp_()
        return (weights @ self._values / self._normalizer(weights))[None]

    def with_values(self, values: Sequence[Tensor]) -> Tensor:
        """Return the (formats, group, positions, head_dim) outputs with other values."""
        outputs = self._weights @ torch.cat(list(values), -1) / self._total
        return outputs.unflatten(-1, (len(values), -1)).permute(2, 0, 1, 3)

    def errors(self, outputs: Tensor) -> list[float]:
        """Return the means over positions of ||W_o change||^2 / ||residual||^2, of (n, group, positions, head_dim) outputs."""
        change = (outputs - self._full).transpose(1, 2).flatten(2)
        squares = ((change @ self._gram) * change).sum(-1).clamp_min(0)
        errors: list[float] = (squares / self._inputs.residual).mean(-1).tolist()
        return errors
