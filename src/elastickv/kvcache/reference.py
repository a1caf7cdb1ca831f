"""The cache of one layer in plain NumPy: what the back ends' storage is tested against."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickv.errors import NonFiniteError, UsageError
from elastickv.kvcache.attention import Float64
from elastickv.kvcache.editable import (
    CacheState,
    check_crop,
    check_growth,
    check_shares,
    check_span,
    checked_rows,
    cold_tokens,
)
from elastickv.kvcache.layer import Float32, StoredHead, beyond_int4, check_marked, check_shape, checked_lengths
from elastickv.kvcache.oracle import Oracle
from elastickv.kvcache.quantize import CODECS, stored_values
from elastickv.kvcache.rounding import limited, rounded
from elastickv.kvcache.scorers import scorer_of, select_pages
from elastickv.recipe import FORMATS, PAGE_TOKENS, AttentionShape, Recipe, regions
from elastickv.recipe.regions import selected


class ReferenceCache:
    """An `EditableCache` that keeps every token in float32 and derives the stored form when asked; decodes in float64."""

    def __init__(self, shape: AttentionShape, capacity: int, dtype: str, recipe: Recipe, anchor_offset: int = 0) -> None:
        self.shape, self.capacity, self.dtype, self.recipe, self.anchor_offset = shape, capacity, dtype, recipe, anchor_offset
        rows = (shape.batch, shape.kv_heads, capacity, shape.head_dim)
        self._keys, self._values = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        self._lengths = np.zeros(shape.batch, np.int64)
        self._step = -1
        self._anchor: int | None = None  # step of the last anchor that was decoded
        recipe.check_shape(shape.head_dim, shape.kv_heads)
        self._fractions = [recipe.fraction(head) for head in range(shape.kv_heads)]
        recipe.check_anchor_offset(anchor_offset)
        self._scorer = scorer_of(recipe)
        self._pages: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._oracle = Oracle(self)
        self._marked: tuple[Any, ...] | None = None
        self.mark()

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self._lengths

    @property
    def step(self) -> int:
        return self._step

    def prefill(self, keys: Float32, values: Float32, lengths: NDArray[np.int64]) -> None:
        """Store (batch, kv_heads, tokens, head_dim) keys and values; row b uses its first `lengths[b]` tokens."""
        used = checked_lengths(lengths, self.shape.batch)
        self._check_block(keys, values)
        if max(used) > min(keys.shape[2], self.capacity):
            raise UsageError(f"a sequence of {max(used)} tokens does not fit a capacity of {self.capacity}")
        self._overwrite(np.zeros_like(used))
        self.extend(keys, values, used)

    def _check_block(self, keys: Float32, values: Float32) -> None:
        rows = (self.shape.batch, self.shape.kv_heads, keys.shape[2], self.shape.head_dim)
        check_shape(keys, rows, "keys")
        check_shape(values, rows, "values")

    def _overwrite(self, lengths: NDArray[np.int64]) -> None:
        """Hold `lengths` tokens before the first step; what was marked may be so no more."""
        self._lengths, self._marked = lengths, None
        self._restart_steps()

    def _restart_steps(self) -> None:
        self._step, self._anchor = -1, None

    def fill_random(self, lengths: NDArray[np.int64], seed: int) -> None:
        """Store seeded random normal tokens."""
        rng = np.random.default_rng(seed)
        keys, values = rng.standard_normal((2, *self._keys.shape), dtype=np.float32)
        self.prefill(keys, values, lengths)

    def append(self, keys: Float32, values: Float32) -> None:
        """Store one token per sequence: (batch, kv_heads, head_dim)."""
        exact = self.recipe.exact_dtype(self.dtype)
        for name, array in (("keys", keys), ("values", values)):
            check_shape(array, (self.shape.batch, self.shape.kv_heads, self.shape.head_dim), name)
        for row, length in enumerate(self._lengths):
            if length >= self.capacity:
                raise UsageError(f"the cache is full: sequence {row} holds {length} of {self.capacity} tokens")
            self._keys[row, :, length], self._values[row, :, length] = rounded(keys[row], exact), rounded(values[row], exact)
        self._lengths = self._lengths + 1
        self._step += 1

    def decode(self, queries: Float32) -> tuple[Float64, Float64]:
        """Attend with one query per sequence, in float64."""
        check_shape(queries, (self.shape.batch, self.shape.query_heads, self.shape.head_dim), "queries")
        steps_since_refresh = self.recipe.steps_since_refresh(self._step, self.anchor_offset)
        if steps_since_refresh and self._anchor != self._step - steps_since_refresh:
            raise RuntimeError(
                f"step {self._step} reuses what anchor {self._step - steps_since_refresh} computes, which was not decoded"
            )
        self._anchor = self._step - steps_since_refresh
        if self.recipe.selection == "pages":
            group = self.shape.group
            for row, head in np.ndindex(self.shape.batch, self.shape.kv_heads):
                self._pages[row, head] = self._select(row, head, queries[row, head * group : (head + 1) * group])
        return self._oracle.decode(queries)

    def _select(self, row: int, head: int, queries: Float32) -> NDArray[np.int64]:
        recipe, length, steps_since_refresh = (
            self.recipe,
            int(self._lengths[row]),
            self.recipe.steps_since_refresh(self._step, self.anchor_offset),
        )
        cold, at_anchor = (
            regions(n, recipe.sinks, recipe.window).cold // PAGE_TOKENS for n in (length, length - steps_since_refresh)
        )
        if steps_since_refresh:
            before = self._pages[row, head]
            return np.concatenate([before[before < at_anchor], np.arange(at_anchor, cold)])
        sinks = regions(length, recipe.sinks, recipe.window).sinks
        keys = self._keys[row, head, sinks : sinks + cold * PAGE_TOKENS].reshape(cold, PAGE_TOKENS, self.shape.head_dim)
        _, scales, zeros = CODECS[str(recipe.key_format)].quantize_keys(keys)
        scores = self._scorer.score(queries, scales, zeros)
        return select_pages(scores, selected(cold, self._fractions[head]))

    def pages_read(self, row: int, kv_head: int) -> NDArray[np.int64] | None:
        """Return the numbers of the cold pages that the last decode read."""
        return self._pages[row, kv_head] if self.recipe.selection == "pages" else None

    def stored(self, row: int, kv_head: int) -> StoredHead:
        """Return what a back end would hold of one KV head of one sequence."""
        length = int(self._lengths[row])
        keys, values = self._keys[row, kv_head, :length], self._values[row, kv_head, :length]
        key_format, value_format = self.recipe.key_format, self.recipe.value_format
        if key_format is None or value_format is None:
            empty = np.zeros((0, self.shape.head_dim))
            return StoredHead(empty, empty, keys.astype(np.float64), values.astype(np.float64))
        split = regions(length, self.recipe.sinks, self.recipe.window)
        cold = slice(split.sinks, split.sinks + split.cold, self.recipe.stride)
        exact = np.r_[0 : split.sinks, split.sinks + split.cold : length]
        return StoredHead(
            stored_values(keys[cold], key_format, False, self.shape.head_dim),
            stored_values(values[cold], value_format, True, self.recipe.v_group(self.shape.head_dim)),
            keys[exact].astype(np.float64),
            values[exact].astype(np.float64),
        )

    @property
    def allocated_bytes(self) -> int:
        """Memory of the tokens kept."""
        return self._keys.nbytes + self._values.nbytes

    def extend(self, keys: Float32, values: Float32, lengths: NDArray[np.int64]) -> None:
        """Store further tokens; row b takes the first `lengths[b]` of its own."""
        self._check_block(keys, values)
        used = checked_lengths(lengths, self.shape.batch)
        check_growth(self._lengths, used, keys.shape[2], self.capacity)
        exact, after = self.recipe.exact_dtype(self.dtype), self._lengths + used
        for row, (first, last) in enumerate(zip(self._lengths, after, strict=True)):
            for kept, given in ((self._keys, keys), (self._values, values)):
                kept[row, :, first:last] = rounded(given[row, :, : last - first], exact)
        self._lengths = after
        self._restart_steps()

    def read(self, first: int, last: int) -> tuple[Float32, Float32]:
        """Return tokens `first` to `last` - 1 as stored; zeros where there are none."""
        check_span(first, last)
        rows = (self.shape.batch, self.shape.kv_heads, last - first, self.shape.head_dim)
        keys, values = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        for row, head in np.ndindex(rows[:2]):
            stored, length = self.stored(row, head), int(self._lengths[row])
            split = regions(length, self.recipe.sinks, self.recipe.window)
            cold = range(0) if self.recipe.is_dense else range(split.sinks, split.sinks + split.cold, self.recipe.stride)
            exact = np.setdiff1d(np.arange(length), np.arange(split.sinks, split.sinks + split.cold) if len(cold) else [])
            places = np.r_[np.array(cold, np.int64), exact]
            seen = (places >= first) & (places < last)
            for out, parts in (
                (keys, (stored.cold_keys, stored.exact_keys)),
                (values, (stored.cold_values, stored.exact_values)),
            ):
                out[row, head, places[seen] - first] = np.concatenate(parts)[seen]
        return keys, values

    def gather(self, rows: NDArray[np.int64], capacity: int) -> "ReferenceCache":
        """Return a cache of `capacity` tokens whose row i is a copy of row `rows[i]`."""
        taken = checked_rows(rows, self.shape.batch)
        other = ReferenceCache(replace(self.shape, batch=len(taken)), capacity, self.dtype, self.recipe, self.anchor_offset)
        longest = int(self._lengths.max(initial=0))
        for mine, copied in ((self._keys, other._keys), (self._values, other._values)):
            copied[:, :, :longest] = mine[taken, :, :longest]
        other._lengths, other._step, other._anchor = self._lengths[taken], self._step, self._anchor
        other._fractions, other._marked = list(self._fractions), None
        heads = range(self.shape.kv_heads)
        other._pages = {(i, h): self._pages[r, h] for i, r in enumerate(taken.tolist()) for h in heads if (r, h) in self._pages}
        other._oracle.take_rows(self._oracle, taken)
        return other

    def __deepcopy__(self, memo: dict[int, object]) -> "ReferenceCache":
        return self.gather(np.arange(self.shape.batch), self.capacity)

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Make row i a copy of what row `rows[i]` was."""
        taken = checked_rows(rows, self.shape.batch, self.shape.batch)
        if (taken == np.arange(self.shape.batch)).all():
            return
        other = self.gather(taken, self.capacity)
        self._marked = None
        self._keys, self._values, self._lengths, self._pages = other._keys, other._values, other._lengths, other._pages
        self._oracle.take_rows(other._oracle, np.arange(self.shape.batch))

    def crop(self, lengths: NDArray[np.int64]) -> None:
        """Keep the first tokens of every row; what was quantised keeps what its codes stand for."""
        used = checked_lengths(lengths, self.shape.batch)
        check_crop(self.recipe, self._lengths, used)
        exact = self.recipe.exact_dtype(self.dtype)
        keys, values = self.read(0, int(self._lengths.max(initial=0)))
        for row, pair in enumerate(zip(self._lengths.tolist(), used.tolist(), strict=True)):
            old, new = (cold_tokens(self.recipe, length) for length in pair)
            span = slice(self.recipe.sinks + new, self.recipe.sinks + old)
            self._keys[row, :, span] = limited(keys[row, :, span], exact)
            self._values[row, :, span] = limited(values[row, :, span], exact)
        self._overwrite(used)

    def set_fractions(self, fractions: Sequence[float]) -> None:
        """Read these shares of the cold pages from here on."""
        if self.recipe.selection != "pages":
            return
        check_shares(fractions, self.shape.kv_heads)
        if list(fractions) != self._fractions:
            self._fractions, self._marked = list(fractions), None
            self._restart_steps()

    def state(self) -> CacheState:
        """Return copies of the tokens and counts; the next decode after `load_state` is an anchor."""
        longest = int(self._lengths.max())
        held = {"keys": self._keys[:, :, :longest].copy(), "values": self._values[:, :, :longest].copy()}
        return held | {"lengths": self._lengths.copy(), "fractions": np.array(self._fractions)}

    def load_state(self, state: CacheState) -> None:
        """Take over what `state` returned."""
        if state["keys"].shape[2] > self.capacity or state["keys"].shape[:2] != self._keys.shape[:2]:
            raise ValueError(f"the saved tokens of shape {state['keys'].shape} do not fit a cache of {self._keys.shape}")
        self.prefill(state["keys"], state["values"], state["lengths"])
        self._fractions = state["fractions"].tolist()

    def mark(self) -> None:
        """Remember the present state."""
        self._marked = (self._lengths.copy(), self._step, self._anchor, dict(self._pages))
        self._oracle.mark()

    def rewind(self) -> None:
        """Return to the marked state."""
        check_marked(self._marked is not None)
        assert self._marked is not None
        lengths, self._step, self._anchor, pages = self._marked
        self._lengths, self._pages = lengths.copy(), dict(pages)
        self._oracle.rewind()

    def raise_non_finite(self) -> None:
        """Raise NonFiniteError if a NaN or infinity is stored, or a cold key that int4 does not hold."""
        tokens = np.arange(self.capacity) < self._lengths[:, None, None]
        bad = tokens & ~(np.isfinite(self._keys) & np.isfinite(self._values)).all(axis=-1)
        for row, head, position in np.argwhere(bad):
            raise NonFiniteError(f"a value that is not finite: sequence {row}, KV head {head}, position {position}")
        largest = None if self.recipe.key_format is None else FORMATS[self.recipe.key_format].largest_key
        if largest is not None:
            for row, length in enumerate(self._lengths):
                split = regions(int(length), self.recipe.sinks, self.recipe.window)
                cold = self._keys[row, :, split.sinks : split.sinks + split.cold]
                for head, number in np.argwhere(np.abs(cold).max(axis=-1) > largest):
                    raise NonFiniteError(beyond_int4(row, head, split.sinks + number))
