"""The part that all caches share: they check what they are called with, then store and compute in their own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from elastickv.errors import UsageError
from elastickv.kvcache.checks import (
    check_alike,
    check_crop,
    check_fractions,
    check_growth,
    check_output,
    check_room,
    check_shape,
    check_span,
    checked_lengths,
    checked_rows,
)
from elastickv.kvcache.gptq import LayerCompensation, check_compensation
from elastickv.kvcache.protocol import Floats, Lengths
from elastickv.kvcache.tensor_view import Float32, Tensor, TensorView
from elastickv.recipe import AttentionShape, Recipe

if TYPE_CHECKING:
    from typing_extensions import Self


class CheckedCache(ABC):
    """A `LayerCache` that checks arguments and passes them on to the methods of the same name with an underscore.

    Those are called with arguments that need no further check; nothing has changed when a check raises.
    """

    shape: AttentionShape
    recipe: Recipe
    dtype: str
    capacity: int
    anchor_offset: int
    compensation: LayerCompensation | None

    def _describe(
        self,
        shape: AttentionShape,
        capacity: int,
        dtype: str,
        recipe: Recipe,
        anchor_offset: int,
        compensation: LayerCompensation | None = None,
    ) -> None:
        recipe.check_anchor_offset(anchor_offset)
        check_compensation(recipe, compensation)
        self.shape, self.capacity, self.dtype, self.recipe, self.anchor_offset = shape, capacity, dtype, recipe, anchor_offset
        self.compensation = compensation

    @property
    @abstractmethod
    def lengths(self) -> Lengths:
        """Tokens of each sequence, (batch,)."""

    @property
    @abstractmethod
    def step(self) -> int:
        """Number of the last appended token's step."""

    @property
    def room(self) -> int:
        """Tokens that every sequence can still take."""
        return self.capacity - int(self.lengths.max(initial=0))

    @property
    @abstractmethod
    def _present_fractions(self) -> list[float]:
        """Fractions of the cold pages that decodes read, one for each KV head; only used where the recipe selects pages."""

    def prefill(self, keys: Tensor, values: Tensor, lengths: Lengths) -> None:
        """Replace all tokens by a prompt; see `LayerCache`."""
        tokens = self._checked_tokens(keys, values)
        used = self._checked_prompt(lengths, tokens)
        self._prefill(keys, values, used)

    def fill_random(self, lengths: Lengths, seed: int) -> None:
        """Replace all tokens by seeded random normal ones; see `LayerCache`."""
        self._fill_random(self._checked_prompt(lengths, self.capacity), seed)

    def _checked_prompt(self, lengths: Lengths, tokens: int) -> Lengths:
        used = checked_lengths(lengths, self.shape.batch)
        most = min(tokens, self.capacity)
        if max(used) > most:
            raise UsageError(f"a sequence of {max(used)} tokens does not fit a capacity of {most}")
        return used

    def _checked_tokens(self, keys: Tensor, values: Tensor) -> int:
        """Return how many tokens there are, after checking their shapes."""
        wanted = (self.shape.batch, self.shape.kv_heads, keys.shape[2], self.shape.head_dim)
        check_shape(keys, wanted, "keys")
        check_shape(values, wanted, "values")
        check_alike(keys, values)
        return wanted[2]

    def append(self, keys: Float32, values: Float32) -> None:
        """Append one token per sequence; see `LayerCache`."""
        self._check_token(keys, values)
        check_room(self.lengths, 1, self.capacity)
        self._append(keys, values)

    def _check_token(self, keys: Tensor, values: Tensor) -> None:
        wanted = (self.shape.batch, self.shape.kv_heads, self.shape.head_dim)
        check_shape(keys, wanted, "keys")
        check_shape(values, wanted, "values")

    def extend(self, keys: Tensor, values: Tensor, lengths: Lengths) -> None:
        """Add a chunk; see `LayerCache`."""
        tokens = self._checked_tokens(keys, values)
        used = checked_lengths(lengths, self.shape.batch)
        check_growth(self.lengths, used, tokens, self.capacity)
        self._extend(keys, values, used)

    def decode(self, queries: Float32) -> tuple[Floats, Floats]:
        """Attend with one query per sequence; see `LayerCache`."""
        check_shape(queries, (self.shape.batch, self.shape.query_heads, self.shape.head_dim), "queries")
        self._expect_decode(self.step)
        return self._decode(queries)

    def prepare_step(self) -> None:
        """Check on the host that the next step can be enqueued; see `LayerCache`."""
        if self.room < 1:
            check_room(self.lengths, 1, self.capacity)
        self._expect_decode(self.step + 1)

    def enqueue_step(
        self,
        keys: TensorView,
        values: TensorView,
        queries: TensorView,
        query_scale: float,
        outputs: TensorView,
        lse: TensorView,
    ) -> None:
        """Append one token per sequence and decode, on the device alone; see `LayerCache`."""
        batch, heads, head_dim = self.shape.batch, self.shape.query_heads, self.shape.head_dim
        self._check_token(keys, values)
        check_shape(queries, (batch, heads, head_dim), "queries")
        check_alike(keys, values, queries)
        for name, tensor, wanted in (("outputs", outputs, (batch, heads, head_dim)), ("lse", lse, (batch, heads))):
            check_output(tensor, wanted, name)
            if tensor.shape != wanted:
                raise ValueError(f"{name} of shape {tensor.shape}: {wanted} is needed")
        self._enqueue_step(keys, values, queries, query_scale, outputs, lse)

    @overload
    def read(self, first: int, last: int) -> tuple[Float32, Float32]: ...
    @overload
    def read(self, first: int, last: int, out: tuple[TensorView, TensorView]) -> None: ...
    def read(self, first: int, last: int, out: tuple[TensorView, TensorView] | None = None) -> tuple[Float32, Float32] | None:
        """Return tokens as they are stored, or copy them to `out`; see `LayerCache`."""
        check_span(first, last)
        if out is None:
            return self._read(first, last)
        check_alike(*out)
        for tensor in out:
            check_output(tensor, (self.shape.batch, self.shape.kv_heads, last - first, self.shape.head_dim), "out")
        if last > first:
            self._read_to(first, last, *out)
        return None

    def gather(self, rows: Lengths, capacity: int) -> Self:
        """Return a cache whose row i is a copy of row `rows[i]`; see `LayerCache`."""
        return self._gather(checked_rows(rows, self.shape.batch), capacity)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self.gather(np.arange(self.shape.batch), self.capacity)

    def reorder(self, rows: Lengths) -> None:
        """Make row i a copy of what row `rows[i]` was; see `LayerCache`."""
        sources = checked_rows(rows, self.shape.batch, self.shape.batch)
        if (sources != np.arange(self.shape.batch)).any():
            self._reorder(sources)

    def crop(self, lengths: Lengths) -> None:
        """Keep the first tokens of every row; see `LayerCache`."""
        after = checked_lengths(lengths, self.shape.batch)
        check_crop(self.recipe, self.lengths, after)
        self._crop(after)

    def set_fractions(self, fractions: Sequence[float]) -> None:
        """Let decodes read these fractions of the cold pages; see `LayerCache`."""
        if self.recipe.selection != "pages":
            return
        check_fractions(fractions, self.shape.kv_heads)
        if list(fractions) != self._present_fractions:
            self._set_fractions(list(fractions))

    @abstractmethod
    def _prefill(self, keys: Tensor, values: Tensor, lengths: Lengths) -> None: ...
    @abstractmethod
    def _fill_random(self, lengths: Lengths, seed: int) -> None: ...
    @abstractmethod
    def _append(self, keys: Float32, values: Float32) -> None: ...
    @abstractmethod
    def _extend(self, keys: Tensor, values: Tensor, lengths: Lengths) -> None: ...
    @abstractmethod
    def _expect_decode(self, step: int) -> None:
        """Raise RuntimeError if a decode at `step` reuses what an anchor computes, and that anchor was not decoded."""

    @abstractmethod
    def _decode(self, queries: Float32) -> tuple[Floats, Floats]: ...
    @abstractmethod
    def _enqueue_step(
        self, keys: TensorView, values: TensorView, queries: TensorView, scale: float, outputs: TensorView, lse: TensorView
    ) -> None: ...
    @abstractmethod
    def _read(self, first: int, last: int) -> tuple[Float32, Float32]: ...
    @abstractmethod
    def _read_to(self, first: int, last: int, keys: TensorView, values: TensorView) -> None: ...
    @abstractmethod
    def _gather(self, rows: Lengths, capacity: int) -> Self: ...
    @abstractmethod
    def _reorder(self, rows: Lengths) -> None: ...
    @abstractmethod
    def _crop(self, lengths: Lengths) -> None: ...
    @abstractmethod
    def _set_fractions(self, fractions: list[float]) -> None: ...
