"""What a cache needs to serve a model's `generate` beside `LayerCache`: further chunks, rows that move, tokens taken back."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elastickv.errors import UsageError
from elastickv.kvcache.layer import Float32, LayerCache
from elastickv.recipe import Recipe, regions

CacheState = dict[str, NDArray[Any]]
Lengths = NDArray[np.int64]


class EditableCache(LayerCache, Protocol):
    """A `LayerCache` whose rows can be extended, read back, moved, cropped and saved.

    `extend`, `crop` and a change by `set_fractions` restart the count of steps: the next decode is an anchor.

    Attributes
    ----------
    allocated_bytes : memory that the cache holds, scratch included.
    """

    @property
    def allocated_bytes(self) -> int: ...

    def extend(self, keys: Float32, values: Float32, lengths: NDArray[np.int64]) -> None:
        """Store (batch, kv_heads, tokens, head_dim) further tokens; row b takes the first `lengths[b]` of its own.

        Raises
        ------
        UsageError : if a sequence would outgrow the capacity; nothing is stored then.
        """

    def read(self, first: int, last: int) -> tuple[Float32, Float32]:
        """Return tokens `first` to `last` - 1 of all rows as they are stored, dequantised.

        Returns
        -------
        keys, values : (batch, kv_heads, last - first, head_dim) float32; zeros where a row ends earlier or a stride keeps
            no such token.
        """

    def gather(self, rows: NDArray[np.int64], capacity: int) -> "EditableCache":
        """Return a cache of `capacity` tokens whose row i is a copy of row `rows[i]`: codes, scales, lists, window and step.

        What was marked is not copied.
        """

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Make row i a copy of what row `rows[i]` was, in place; (batch,) int64."""

    def crop(self, lengths: NDArray[np.int64]) -> None:
        """Keep the first `lengths[b]` tokens of row b.

        Tokens that were quantised and come to lie in the window again keep the values that their codes stand for.

        Raises
        ------
        UsageError : if a row would grow, or a stride has dropped tokens that are needed again.
        """

    def set_fractions(self, fractions: Sequence[float]) -> None:
        """Let decodes read these shares of the cold pages, one for each KV head, instead of the recipe's; 1 reads all.

        Of no effect where the recipe selects no pages.
        """

    def state(self) -> CacheState:
        """Return copies of all that a cache of the same shape, dtype and recipe needs to go on from here."""

    def load_state(self, state: CacheState) -> None:
        """Take over what `state` returned.

        Raises
        ------
        ValueError : if the arrays are not those of a cache like this one, or do not fit its capacity.
        """


def checked_rows(rows: NDArray[np.integer[Any]], batch: int, count: int | None = None) -> NDArray[np.int64]:
    """Return numbers of rows as int64.

    Raises
    ------
    ValueError : unless they are whole numbers from 0 to batch - 1, and `count` of them where that is given.
    """
    given = np.asarray(rows)
    wrong = given.dtype.kind not in "iu" or given.ndim != 1 or not 0 < len(given) == (count or len(given))
    if wrong or given.min() < 0 or given.max() >= batch:
        raise ValueError(f"{given.tolist()} are no rows of {batch}: give {count or 'some'} whole numbers from 0 to {batch - 1}")
    return given.astype(np.int64)


def check_span(first: int, last: int) -> None:
    """Raise ValueError unless tokens `first` to `last` - 1 can be read: the kernels take addresses."""
    if not 0 <= first <= last:
        raise ValueError(f"tokens {first} to {last} cannot be read: give a first one from 0 up and an end not before it")


def check_growth(lengths: Lengths, more: Lengths, given: int, capacity: int) -> None:
    """Refuse to store `more[b]` of `given` tokens behind the `lengths[b]` of row b, where one lacks them or the room.

    Raises
    ------
    UsageError : naming the row.
    """
    for row, (held, new) in enumerate(zip(lengths.tolist(), more.tolist(), strict=True)):
        if new > given:
            raise UsageError(f"sequence {row} is to take {new} tokens of {given} that are given: give no more than there are")
        if held + new > capacity:
            raise UsageError(f"the cache is full: sequence {row} holds {held} of {capacity} tokens, {new} are added")


def check_crop(recipe: Recipe, before: Lengths, after: Lengths) -> None:
    """Refuse to crop rows of `before` tokens to `after`.

    Raises
    ------
    UsageError : if a row would grow, or a stride has dropped tokens that are needed again.
    """
    if any(after > before) or any(after < 0):
        raise UsageError(f"a cache of {before.tolist()} tokens cannot be cropped to {after.tolist()}: give fewer, from 0 up")
    pairs = zip(before.tolist(), after.tolist(), strict=True)
    if recipe.stride > 1 and any(cold_tokens(recipe, old) > cold_tokens(recipe, new) for old, new in pairs):
        raise UsageError(f"{recipe} has dropped tokens that a crop to {after.tolist()} needs again: choose another selection")


def cold_tokens(recipe: Recipe, length: int) -> int:
    """Return how many of a row's tokens are cold."""
    return 0 if recipe.is_dense else regions(length, recipe.sinks, recipe.window).cold


def check_lists(lists: NDArray[np.int32], listed: NDArray[Any], fresh: NDArray[Any], pages: NDArray[Any]) -> None:
    """Refuse saved lists of pages that would make a decode read what is no page: kernels trust them.

    Parameters
    ----------
    lists : (batch, kv_heads, n), page numbers, of which the first `listed` count.
    listed, fresh : (batch, kv_heads), pages listed, and the first page that is read beside them.
    pages : (batch, 1), cold pages that there are.

    Raises
    ------
    ValueError : if a number is out of range.
    """
    if not ((listed >= 0) & (listed <= fresh) & (fresh <= pages) & (listed <= lists.shape[2])).all():
        raise ValueError("the saved lists have more pages than the cache")
    counted = np.arange(lists.shape[2]) < listed[..., None]
    if (counted & ((lists < 0) | (lists >= fresh[..., None]))).any():
        raise ValueError("the saved lists name pages that the cache does not have")


def check_shares(fractions: ArrayLike, kv_heads: int) -> None:
    """Raise ValueError unless there is a share of the pages for every KV head, above 0 and at most 1."""
    shares = np.asarray(fractions, np.float64)
    if shares.shape != (kv_heads,) or not ((shares > 0) & (shares <= 1)).all():
        raise ValueError(f"the shares of the pages are {shares.tolist()}: {kv_heads} above 0 and at most 1 are needed")
