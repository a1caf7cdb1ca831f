"""Report what a cache holds, what it read, and the ratio by context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from typing import Any

from elastickv.kvcache import LayerCache
from elastickv.recipe import AttentionShape, Recipe, dense_bytes, step_bytes, stored_bits, stored_bytes
from elastickv.transformers.budget import Budget, scaled
from elastickv.transformers.config import ElasticConfig
from elastickv.transformers.device_events import Timestamp, on_one_clock, seconds

_CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass
class _Run:
    """Consecutive decodes: lengths and step number of the first, their count, and the factor on the shares of pages."""

    lengths: tuple[int, ...]
    step: int
    count: int
    scale: float | None

    def continues_with(self, lengths: tuple[int, ...], step: int, scale: float | None) -> bool:
        """Whether a decode is the next of this run."""
        grown = tuple(n + self.count for n in self.lengths)
        return (grown, self.step + self.count, self.scale) == (lengths, step, scale)


class Ledger:
    """Counts the passes of a cache at its first layer."""

    def __init__(self, first_layer: int) -> None:
        self._first = first_layer
        self.forget()

    def forget(self) -> None:
        """Start over."""
        self._runs: list[_Run] = []
        self._prompts: list[tuple[Timestamp, Timestamp]] = []
        self._quantized: list[tuple[Timestamp, Timestamp]] = []
        self._began: Timestamp | None = None
        self.chunks = 0

    def begin(self, layer: int, start: Timestamp) -> None:
        """Note when a prompt reaches a layer. Transfers between devices do not count: each device has its own interval."""
        if layer == self._first or (self._began is not None and not on_one_clock(self._began, start)):
            self._began = start

    def quantized(self, since: Timestamp, until: Timestamp) -> None:
        """Note the interval in which a layer's prompt was stored."""
        self._quantized.append((since, until))

    def end_prompt(self, end: Timestamp) -> None:
        """Note when a layer is done with a prompt."""
        if self._began is not None:
            self._prompts.append((self._began, end))
            self._began = end

    @property
    def prompt_seconds(self) -> float:
        """Seconds of prompts, from their first layer to their last."""
        return sum(starmap(seconds, self._prompts))

    @property
    def quantize_seconds(self) -> float:
        """The part of `prompt_seconds` in which layers were stored."""
        return sum(starmap(seconds, self._quantized))

    def note_chunk(self, layer: int) -> None:
        """Note a pass of several tokens, which reads everything stored."""
        self.chunks += layer == self._first

    def note_step(self, layer: int, cache: LayerCache, scale: float | None) -> None:
        """Note a decode."""
        if layer != self._first:
            return
        step, lengths = cache.step, tuple(int(n) for n in cache.lengths)
        last = self._runs[-1] if self._runs else None
        if last is not None and last.continues_with(lengths, step, scale):
            last.count += 1
        else:
            self._runs.append(_Run(lengths, step, 1, scale))

    @property
    def steps(self) -> int:
        """Decodes so far."""
        return sum(run.count for run in self._runs)

    def bytes_read(self, budget: Budget) -> tuple[float, float]:
        """Return (read, dense): bytes that all decodes read, and that a dense 16-bit cache would have read."""
        recipes = Counter((recipe, budget.anchor_offset(layer)) for layer, recipe in budget.recipes.items())
        read = dense = 0.0
        for run in self._runs:
            for number in range(run.count):
                lengths = [n + number for n in run.lengths]
                shape = replace(budget.shape, batch=len(lengths))
                dense += len(budget.recipes) * dense_bytes(lengths, shape)
                for (recipe, anchor_offset), times in recipes.items():
                    steps_since_refresh = recipe.steps_since_refresh(run.step + number, anchor_offset)
                    read += times * step_bytes(scaled(recipe, run.scale), lengths, shape, budget.dtype, steps_since_refresh).kv
        return read, dense

    def copy(self) -> Ledger:
        """Return an independent copy."""
        other = Ledger(self._first)
        other.__dict__.update(self.__dict__)
        other._runs = [replace(run) for run in self._runs]
        other._prompts, other._quantized = list(self._prompts), list(self._quantized)
        return other


@dataclass(frozen=True)
class ContextRow:
    """Ratios at one context.

    Attributes
    ----------
    context : tokens of a sequence.
    read_ratio : dense 16-bit bytes / bytes read, averaged over an anchor interval, all elastic layers together.
    stored_ratio : dense 16-bit bytes / bytes stored.
    everything : whether everything stored is read.
    """

    context: int
    read_ratio: float
    stored_ratio: float
    everything: bool


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds and has read. Bytes are of the elastic layers, except for `stock_bytes`.

    If a model is split over ranks, bytes held and read, and ratios, are totals of all ranks; `allocated_bytes` and
    `stock_bytes` are of the present rank.

    Attributes
    ----------
    compress : the requested C, or None where recipes were given.
    holds_from : the context from which on C is met. Below it, everything is read.
    recipes : layer -> recipe in force.
    calibrated : whether the shares of pages come from a calibration.
    lengths : tokens of each sequence, padding not counted.
    stored_bytes, dense_bytes : bytes of the tokens, and of the same tokens in a dense 16-bit cache.
    allocated_bytes : memory allocated for the tokens, including spare room and scratch.
    stock_bytes : bytes of layers that keep Transformers' own cache.
    decodes, chunks : passes of one token, and passes of several tokens, which read everything stored.
    captured : decodes that were replays of a captured graph.
    not_captured : why none was, or None.
    ahead : captured decodes that had already been launched when they were requested.
    read_bytes, dense_read_bytes : bytes that all decodes read, and that a dense 16-bit cache would have read.
    prompt_seconds, quantize_seconds : time of the attention layers' prompt passes, and the part spent on storing.
    by_context : ratios at other contexts.
    ranks : processes that the model is split over.
    stock_dense_bytes : bytes of what the layers with Transformers' own cache hold, in 16 bit.
    by_keys : layers that have keys per channel because the prompt's keys are not suited to a scale for each token.
    stored_bits : the requested bits an element, or None.
    bits_per_element : bits of an element that is not exact, with its scales and zeros, mean over the elastic layers; 16 of a
        layer that is stored whole. 0 without elastic layers.
    """

    compress: float | None
    holds_from: int
    recipes: Mapping[int, Recipe]
    calibrated: bool
    lengths: tuple[int, ...]
    stored_bytes: int
    dense_bytes: int
    allocated_bytes: int
    stock_bytes: int
    decodes: int
    captured: int
    not_captured: str | None
    ahead: int
    chunks: int
    read_bytes: float
    dense_read_bytes: float
    prompt_seconds: float
    quantize_seconds: float
    by_context: tuple[ContextRow, ...]
    ranks: int = 1
    stock_dense_bytes: int = 0
    by_keys: tuple[int, ...] = ()
    stored_bits: float | None = None
    bits_per_element: float = 0.0

    @property
    def quantise_seconds(self) -> float:
        """The former name of `quantize_seconds`."""
        return self.quantize_seconds

    @property
    def read_ratio(self) -> float | None:
        """Dense bytes / bytes read of all decodes so far. None before the first."""
        return self.dense_read_bytes / self.read_bytes if self.read_bytes else None

    @property
    def stored_ratio(self) -> float | None:
        """Dense 16-bit bytes / bytes stored now. None while nothing is stored."""
        return self.dense_bytes / self.stored_bytes if self.stored_bytes else None

    @property
    def model_stored_ratio(self) -> float | None:
        """Like `stored_ratio`, of all layers: those with Transformers' own cache count as they are, and dense in 16 bit."""
        stored = self.stored_bytes + self.stock_bytes
        return (self.dense_bytes + self.stock_dense_bytes) / stored if stored else None

    def __str__(self) -> str:
        target = "recipes as given" if self.compress is None else f"compress={self.compress:g}"
        if self.stored_bits is not None:
            target = f"stored_bits={self.stored_bits:g} ({self.bits_per_element:.3f} bits an element)"
        lines = [f"ElasticCache: {target}, {len(self.recipes)} elastic layers, {'' if self.calibrated else 'not '}calibrated"]
        for recipe, layers in _grouped(self.recipes):
            lines.append(f"  {recipe}: layers {layers}")
        if self.by_keys:
            layers = ", ".join(map(str, self.by_keys))
            lines.append(f"  keys per channel, because a scale for each token does not suit the prompt's: layers {layers}")
        if self.holds_from > 1:
            lines.append(f"  the ratio holds from {self.holds_from} tokens on; below, everything is read")
        if self.lengths:
            ratio = f", {self.stored_ratio:.2f}x less than dense" if self.stored_ratio else ""
            here = f" on this rank, one of {self.ranks}" if self.ranks > 1 else ""
            allocated = f"({self.allocated_bytes} allocated{here})"
            holds = "elastic layers hold" if self.stock_bytes else "holds"
            lines.append(f"  {holds} {list(self.lengths)} tokens in {self.stored_bytes} bytes{ratio} {allocated}")
        if self.stock_bytes:
            total = self.stored_bytes + self.stock_bytes
            lines.append(f"  stock layers hold {self.stock_bytes} bytes")
            lines.append(f"  all layers hold {total} bytes, {self.model_stored_ratio:.2f}x less than dense")
        if self.read_ratio is not None:
            where = "of the elastic layers" if self.stock_bytes else ""
            read = f"  {self.decodes} decodes read {self.read_bytes:.0f} bytes {where}".rstrip()
            lines.append(f"{read}, {self.read_ratio:.2f}x less than dense")
            why = f": {self.not_captured}" if self.not_captured else f", {self.ahead} launched speculatively"
            lines.append(f"  {self.captured} of them captured{why}")
        if self.prompt_seconds:
            share = 100 * self.quantize_seconds / self.prompt_seconds
            lines.append(f"  prompt {self.prompt_seconds:.3f} s, of it storing {self.quantize_seconds:.3f} s ({share:.1f} %)")
        lines.append("  context   read ratio   stored ratio")
        for row in self.by_context:
            note = "   everything is read" if row.everything else ""
            lines.append(f"  {row.context:7d}   {row.read_ratio:10.2f}   {row.stored_ratio:12.2f}{note}")
        return "\n".join(lines)


def report_of(
    config: ElasticConfig, ledger: Ledger, layers: Sequence[Any], lengths: tuple[int, ...], **others: Any
) -> CacheReport:
    """Return the report of a cache.

    Parameters
    ----------
    layers : those with Transformers' own cache; linear attention counts as no bytes.
    others : the fields of a `CacheReport` that do not follow from these.
    """
    budget = config.budget or config.budget_for(config.context or config.usual, "bf16")
    longest = max(lengths, default=0)
    stored, dense = held_bytes(budget, lengths) if config.sizes.elastic else (0, 0)
    read, dense_read = ledger.bytes_read(budget)
    stock = [tensor for layer in layers if getattr(layer, "keys", None) is not None for tensor in (layer.keys, layer.values)]
    return CacheReport(
        compress=config.ratio,
        holds_from=budget.holds_from,
        recipes={layer: budget.recipe_at(layer, longest or budget.context) for layer in budget.recipes},
        calibrated=config.calibration is not None,
        lengths=lengths,
        stored_bytes=stored,
        dense_bytes=dense,
        stock_bytes=sum(tensor.nbytes for tensor in stock),
        stock_dense_bytes=sum(2 * tensor.numel() for tensor in stock),
        decodes=ledger.steps,
        chunks=ledger.chunks,
        read_bytes=read,
        dense_read_bytes=dense_read,
        prompt_seconds=ledger.prompt_seconds,
        quantize_seconds=ledger.quantize_seconds,
        by_keys=config.by_keys,
        stored_bits=config.stored_bits,
        bits_per_element=_mean_bits(budget),
        by_context=by_context(budget, longest, config.sizes.max_positions) if config.sizes.elastic else (),
        **others,
    )


def by_context(budget: Budget, longest: int, limit: int | None) -> tuple[ContextRow, ...]:
    """Return the ratios at round contexts up to the model's limit, and at the present one."""
    contexts = sorted({n for n in (*_CONTEXTS, longest) if n and (limit is None or n <= limit)}) or [limit or longest]
    rows = []
    for context in contexts:
        scale = budget.reading(context).scale
        stored = sum(stored_bytes(recipe, [context], budget.shape, budget.dtype) for recipe in budget.recipes.values())
        dense = len(budget.recipes) * dense_bytes([context], budget.shape)
        rows.append(ContextRow(context, budget.ratio_at(context, scale), dense / stored, scale is None))
    return tuple(rows)


def held_bytes(budget: Budget, lengths: Sequence[int]) -> tuple[int, int]:
    """Return (stored, dense) bytes of the elastic layers."""
    if not lengths:
        return 0, 0
    shape: AttentionShape = replace(budget.shape, batch=len(lengths))
    stored = sum(stored_bytes(recipe, lengths, shape, budget.dtype) for recipe in budget.recipes.values())
    return stored, len(budget.recipes) * dense_bytes(lengths, shape)


def _mean_bits(budget: Budget) -> float:
    """Return the bits of a cold element, mean over the elastic layers."""
    bits = [stored_bits(recipe, budget.shape.head_dim) for recipe in budget.recipes.values()]
    return sum(bits) / len(bits) if bits else 0.0


def _grouped(recipes: Mapping[int, Recipe]) -> list[tuple[Recipe, str]]:
    by_recipe: dict[Recipe, list[int]] = {}
    for layer, recipe in recipes.items():
        by_recipe.setdefault(recipe, []).append(layer)
    return [(recipe, ", ".join(map(str, layers))) for recipe, layers in by_recipe.items()]
