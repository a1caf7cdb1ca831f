"""The cache of one layer in plain NumPy, which the backends are tested against."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickv.errors import NonFiniteError
from elastickv.kvcache.attention import Float64
from elastickv.kvcache.checked_cache import CheckedCache
from elastickv.kvcache.checks import beyond_largest_key, check_anchor, check_marked, cold_tokens
from elastickv.kvcache.gptq import LayerCompensation
from elastickv.kvcache.hadamard import rotated, rotated_head, rotated_tokens
from elastickv.kvcache.oracle import Oracle
from elastickv.kvcache.protocol import CacheState, Lengths, StoredHead
from elastickv.kvcache.quantize import CODECS, stored_values
from elastickv.kvcache.rounding import limited, rounded
from elastickv.kvcache.scorers import scale_factor, scorer_of, select_pages
from elastickv.kvcache.tensor_view import Float32, Tensor, TensorView, to_array, write_array
from elastickv.recipe import FORMATS, PAGE_TOKENS, AttentionShape, Recipe, regions
from elastickv.recipe.regions import selected


class ReferenceCache(CheckedCache):
    """A `LayerCache` that stores every token in float32, derives the stored form on request and decodes in float64."""

    def __init__(
        self,
        shape: AttentionShape,
        capacity: int,
        dtype: str,
        recipe: Recipe,
        anchor_offset: int = 0,
        compensation: LayerCompensation | None = None,
    ) -> None:
        recipe.check_shape(shape.head_dim, shape.kv_heads)
        self._describe(shape, capacity, dtype, recipe, anchor_offset, compensation)
        rows = (shape.batch, shape.kv_heads, capacity, shape.head_dim)
        self._keys, self._values = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        self._lengths = np.zeros(shape.batch, np.int64)
        self._step = -1
        self._anchor: int | None = None  # step of the last anchor that was decoded
        self._fractions = [recipe.fraction(head) for head in range(shape.kv_heads)]
        self._scorer = scorer_of(recipe)
        self._pages: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._oracle = Oracle(self)
        self._marked: tuple[Any, ...] | None = None
        self._enqueued: tuple[Lengths, int, int | None, dict[tuple[int, int], NDArray[np.int64]]] | None = None
        self.launch_key = object()
        self.mark()

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self._lengths

    @property
    def step(self) -> int:
        return self._step

    @property
    def _present_fractions(self) -> list[float]:
        return self._fractions

    def _prefill(self, keys: Tensor, values: Tensor, lengths: Lengths) -> None:
        self._overwrite(np.zeros_like(lengths))
        self._extend(keys, values, lengths)

    def _overwrite(self, lengths: NDArray[np.int64]) -> None:
        """Hold `lengths` tokens before the first step; the mark may no longer be valid."""
        self._lengths, self._marked = lengths, None
        self._restart_steps()

    def _restart_steps(self) -> None:
        self._step, self._anchor = -1, None

    def _fill_random(self, lengths: Lengths, seed: int) -> None:
        rng = np.random.default_rng(seed)
        keys, values = rng.standard_normal((2, *self._keys.shape), dtype=np.float32)
        self._prefill(keys, values, lengths)

    def _append(self, keys: Float32, values: Float32) -> None:
        exact = self.recipe.exact_dtype(self.dtype)
        keys, values = rotated_tokens(keys, values, self.recipe)
        for row, length in enumerate(self._lengths):
            self._keys[row, :, length], self._values[row, :, length] = rounded(keys[row], exact), rounded(values[row], exact)
        self._lengths = self._lengths + 1
        self._step += 1

    def _expect_decode(self, step: int) -> None:
        check_anchor(self.recipe, step, self.anchor_offset, self._anchor)

    def _decode(self, queries: Float32) -> tuple[Float64, Float64]:
        self._anchor = self._step - self.recipe.steps_since_refresh(self._step, self.anchor_offset)
        if self.recipe.selection == "pages":
            group = self.shape.group
            for row, head in np.ndindex(self.shape.batch, self.shape.kv_heads):
                self._pages[row, head] = self._select(row, head, queries[row, head * group : (head + 1) * group])
        return self._oracle.decode(queries)

    def _enqueue_step(
        self, keys: TensorView, values: TensorView, queries: TensorView, scale: float, outputs: TensorView, lse: TensorView
    ) -> None:
        head_dim = self.shape.head_dim
        before = (self._lengths, self._step, self._anchor, dict(self._pages))
        self._append(to_array(keys, head_dim), to_array(values, head_dim))
        results = self._decode(to_array(queries, head_dim) * np.float32(scale))
        for target, result in zip((outputs, lse), results, strict=True):
            write_array(target, result)
        self._enqueued = (self._lengths, self._step, self._anchor, self._pages)
        self._lengths, self._step, anchor, self._pages = before
        self._anchor = anchor if anchor == self._enqueued[2] else None  # a new anchor has replaced what the last one left

    def commit_step(self) -> None:
        """Count the token of the enqueued step."""
        if self._enqueued is not None:
            (self._lengths, self._step, self._anchor, self._pages), self._enqueued = self._enqueued, None

    def rollback_step(self) -> None:
        """Undo an enqueued step that was not committed."""
        self._enqueued = None

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
        key_format = str(recipe.key_format)
        queries = rotated(queries) if recipe.rotates_keys else queries
        _, scales, zeros = CODECS[key_format].quantize_keys(keys)
        scores = self._scorer.score(queries, scale_factor(key_format) * scales.astype(np.float64), zeros)
        return select_pages(scores, selected(cold, self._fractions[head]))

    def pages_read(self, row: int, kv_head: int) -> NDArray[np.int64] | None:
        """Return the numbers of the cold pages that the last decode read."""
        return self._pages[row, kv_head] if self.recipe.selection == "pages" else None

    def stored(self, row: int, kv_head: int) -> StoredHead:
        """Return what is stored of one KV head of one sequence, with a rotation undone."""
        return rotated_head(self._held(row, kv_head), self.recipe)

    def _held(self, row: int, kv_head: int) -> StoredHead:
        length = int(self._lengths[row])
        keys, values = self._keys[row, kv_head, :length], self._values[row, kv_head, :length]
        key_format, value_format = self.recipe.key_format, self.recipe.value_format
        if key_format is None or value_format is None:
            empty = np.zeros((0, self.shape.head_dim))
            return StoredHead(empty, empty, keys.astype(np.float64), values.astype(np.float64))
        split = regions(length, self.recipe.sinks, self.recipe.window)
        cold = slice(split.sinks, split.sinks + split.cold, self.recipe.stride)
        exact = np.r_[0 : split.sinks, split.sinks + split.cold : length]
        parts = (None, None) if self.compensation is None else (self.compensation.keys, self.compensation.values)
        of_keys, of_values = (None if part is None else (part.order[kv_head], part.shares[kv_head]) for part in parts)
        return StoredHead(
            stored_values(keys[cold], key_format, False, self.shape.head_dim, of_keys),
            stored_values(values[cold], value_format, True, self.recipe.v_group(self.shape.head_dim), of_values),
            keys[exact].astype(np.float64),
            values[exact].astype(np.float64),
        )

    @property
    def allocated_bytes(self) -> int:
        """Memory of the tokens."""
        return self._keys.nbytes + self._values.nbytes

    def _extend(self, keys: Tensor, values: Tensor, lengths: Lengths) -> None:
        k, v = (to_array(tensor, self.shape.head_dim) for tensor in (keys, values))
        self._extend_rotated(*rotated_tokens(k, v, self.recipe), lengths)

    def _extend_rotated(self, new_keys: Float32, new_values: Float32, lengths: Lengths) -> None:
        exact, after = self.recipe.exact_dtype(self.dtype), self._lengths + lengths
        for row, (first, last) in enumerate(zip(self._lengths, after, strict=True)):
            for target, source in ((self._keys, new_keys), (self._values, new_values)):
                target[row, :, first:last] = rounded(source[row, :, : last - first], exact)
        self._lengths = after
        self._restart_steps()

    def _read(self, first: int, last: int) -> tuple[Float32, Float32]:
        return rotated_tokens(*self._read_held(first, last), self.recipe)

    def _read_held(self, first: int, last: int) -> tuple[Float32, Float32]:
        rows = (self.shape.batch, self.shape.kv_heads, last - first, self.shape.head_dim)
        keys, values = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        for row, head in np.ndindex(rows[:2]):
            stored, length = self._held(row, head), int(self._lengths[row])
            split = regions(length, self.recipe.sinks, self.recipe.window)
            cold = range(0) if self.recipe.is_dense else range(split.sinks, split.sinks + split.cold, self.recipe.stride)
            exact = np.setdiff1d(np.arange(length), np.arange(split.sinks, split.sinks + split.cold) if len(cold) else [])
            positions = np.r_[np.array(cold, np.int64), exact]
            seen = (positions >= first) & (positions < last)
            for out, parts in (
                (keys, (stored.cold_keys, stored.exact_keys)),
                (values, (stored.cold_values, stored.exact_values)),
            ):
                out[row, head, positions[seen] - first] = np.concatenate(parts)[seen]
        return keys, values

    def _read_to(self, first: int, last: int, keys: TensorView, values: TensorView) -> None:
        for target, rows in zip((keys, values), self._read(first, last), strict=True):
            write_array(target, rows)

    def _gather(self, rows: Lengths, capacity: int) -> "ReferenceCache":
        shape = replace(self.shape, batch=len(rows))
        other = ReferenceCache(shape, capacity, self.dtype, self.recipe, self.anchor_offset, self.compensation)
        longest = int(self._lengths.max(initial=0))
        for mine, copied in ((self._keys, other._keys), (self._values, other._values)):
            copied[:, :, :longest] = mine[rows, :, :longest]
        other._lengths, other._step, other._anchor = self._lengths[rows], self._step, self._anchor
        other._fractions, other._marked = list(self._fractions), None
        heads = range(self.shape.kv_heads)
        other._pages = {(i, h): self._pages[r, h] for i, r in enumerate(rows.tolist()) for h in heads if (r, h) in self._pages}
        other._oracle.take_rows(self._oracle, rows)
        return other

    def _reorder(self, rows: Lengths) -> None:
        other = self._gather(rows, self.capacity)
        self._marked = None
        self._keys, self._values, self._lengths, self._pages = other._keys, other._values, other._lengths, other._pages
        self._oracle.take_rows(other._oracle, np.arange(self.shape.batch))

    def _crop(self, lengths: Lengths) -> None:
        exact = self.recipe.exact_dtype(self.dtype)
        keys, values = self._read_held(0, int(self._lengths.max(initial=0)))
        for row, pair in enumerate(zip(self._lengths.tolist(), lengths.tolist(), strict=True)):
            old, new = (cold_tokens(self.recipe, length) for length in pair)
            span = slice(self.recipe.sinks + new, self.recipe.sinks + old)
            self._keys[row, :, span] = limited(keys[row, :, span], exact)
            self._values[row, :, span] = limited(values[row, :, span], exact)
        self._overwrite(lengths)

    def _set_fractions(self, fractions: list[float]) -> None:
        self._fractions, self._marked = fractions, None
        self._restart_steps()

    def state(self) -> CacheState:
        """Return copies of the tokens and counts. The next decode after `load_state` is an anchor."""
        longest = int(self._lengths.max())
        tokens = {"keys": self._keys[:, :, :longest].copy(), "values": self._values[:, :, :longest].copy()}
        return tokens | {"lengths": self._lengths.copy(), "fractions": np.array(self._fractions)}

    def load_state(self, state: CacheState) -> None:
        """Replace the contents by what `state` returned."""
        if state["keys"].shape[2] > self.capacity or state["keys"].shape[:2] != self._keys.shape[:2]:
            raise ValueError(f"the saved tokens of shape {state['keys'].shape} do not fit a cache of {self._keys.shape}")
        self._overwrite(np.zeros_like(self._lengths))
        self._extend_rotated(state["keys"], state["values"], self._checked_prompt(state["lengths"], state["keys"].shape[2]))
        self._fractions = state["fractions"].tolist()

    def mark(self) -> None:
        """Save the present state."""
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
        """Raise NonFiniteError if a NaN or infinity is stored, or a cold key beyond the range of its format."""
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
                    raise NonFiniteError(beyond_largest_key(self.recipe, row, head, split.sinks + number))
