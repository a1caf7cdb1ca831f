"""Checks of a cache's arguments: kernels take addresses, so invalid arguments are rejected here."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elastickv.errors import UsageError
from elastickv.kvcache.protocol import Lengths
from elastickv.kvcache.tensor_view import Tensor, TensorView
from elastickv.recipe import Recipe, regions
from elastickv.recipe.formats import FORMATS


def beyond_largest_key(recipe: Recipe, row: int, kv_head: int, position: int) -> str:
    """Return the message about a key that is too large for the recipe's format of K."""
    assert recipe.key_format is not None
    fmt = FORMATS[recipe.key_format]
    return (
        f"a key beyond what {fmt.name} holds: sequence {row}, KV head {kv_head}, position {position}; "
        f"{fmt.name} keys hold magnitudes up to {fmt.largest_key:.0f}: choose another format for K"
    )


def check_marked(marked: bool) -> None:
    """Raise RuntimeError unless the marked state can still be restored."""
    if not marked:
        raise RuntimeError("there is no mark to return to, or its tokens have been written over since: mark() once more")


def checked_lengths(lengths: NDArray[np.integer[Any]], batch: int) -> NDArray[np.int64]:
    """Return the tokens of each sequence as the kernels read them: contiguous (batch,) int64.

    Raises
    ------
    ValueError : unless there is one whole number from 0 up for each sequence.
    """
    array = np.asarray(lengths)
    used = np.ascontiguousarray(array.astype(np.int64)) if array.dtype.kind in "iu" else None
    if used is None or used.shape != (batch,) or used.min() < 0:
        raise ValueError(f"{array.tolist()} are no lengths of {batch} sequences: give a whole number from 0 up for each")
    return used


def check_shape(tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Raise ValueError unless a tensor has `shape`; a `TensorView` may have fewer channels in the last dimension."""
    if isinstance(tensor, TensorView):
        fits = tensor.shape[:-1] == shape[:-1] and tensor.shape[-1] <= shape[-1] and tensor.strides[-1] == 1
    else:
        fits = tensor.shape == shape
    if not fits:
        raise ValueError(f"{name} of shape {tensor.shape}: {shape} is needed")


def check_alike(*tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are arrays, or all are views of one dtype and number of channels."""
    kinds = [(t.dtype, t.shape[-1]) if isinstance(t, TensorView) else None for t in tensors]
    if len(set(kinds)) > 1:
        raise ValueError(f"tensors of {kinds}: one dtype and one number of channels is needed")


def check_output(tensor: TensorView, shape: tuple[int, ...], name: str) -> None:
    """Raise ValueError unless a tensor can receive `shape`, or fewer channels of it, without gaps."""
    check_shape(tensor, shape, name)
    if not tensor.is_contiguous:
        raise ValueError(f"{name} of strides {tensor.strides}: a contiguous tensor is needed")


def check_room(lengths: Lengths, more: int, capacity: int) -> None:
    """Raise UsageError, naming the row, if a sequence can't take `more` tokens."""
    for row, length in enumerate(lengths.tolist()):
        if length + more > capacity:
            raise UsageError(f"the cache is full: sequence {row} holds {length} of {capacity} tokens")


def check_anchor(recipe: Recipe, step: int, anchor_offset: int, decoded: int | None) -> None:
    """Raise RuntimeError if a decode at `step` would reuse a cold output or a list of pages that was never computed.

    Parameters
    ----------
    decoded : step of the last anchor that was decoded, or None.
    """
    steps_since_refresh = recipe.steps_since_refresh(step, anchor_offset)
    anchor = step - steps_since_refresh
    if steps_since_refresh and decoded != anchor:
        what = "list of pages" if recipe.selection == "pages" else "cold output"
        raise RuntimeError(f"step {step} reuses the {what} of anchor {anchor}, which was not decoded")


def checked_rows(rows: NDArray[np.integer[Any]], batch: int, count: int | None = None) -> NDArray[np.int64]:
    """Return row numbers as int64.

    Raises
    ------
    ValueError : unless they are whole numbers from 0 to batch - 1, and `count` of them where a count is required.
    """
    array = np.asarray(rows)
    wrong = array.dtype.kind not in "iu" or array.ndim != 1 or not 0 < len(array) == (count or len(array))
    if wrong or array.min() < 0 or array.max() >= batch:
        raise ValueError(f"{array.tolist()} are no rows of {batch}: give {count or 'some'} whole numbers from 0 to {batch - 1}")
    return array.astype(np.int64)


def check_span(first: int, last: int) -> None:
    """Raise ValueError unless `first` to `last` - 1 is a range of tokens, which may be empty."""
    if not 0 <= first <= last:
        raise ValueError(f"tokens {first} to {last} cannot be read: give a first one from 0 up and an end not before it")


def check_growth(lengths: Lengths, more: Lengths, available: int, capacity: int) -> None:
    """Check that row b, of `lengths[b]` tokens, can take `more[b]` of the `available` new ones.

    Raises
    ------
    UsageError : naming the row that lacks the tokens or the room.
    """
    for row, (held, new) in enumerate(zip(lengths.tolist(), more.tolist(), strict=True)):
        if new > available:
            raise UsageError(
                f"sequence {row} is to take {new} tokens of {available} that are given: give no more than there are"
            )
        if held + new > capacity:
            raise UsageError(f"the cache is full: sequence {row} holds {held} of {capacity} tokens, {new} are added")


def check_crop(recipe: Recipe, before: Lengths, after: Lengths) -> None:
    """Check that rows of `before` tokens can be cropped to `after`.

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
    """Check saved lists of pages: kernels read the pages that they name.

    Parameters
    ----------
    lists : (batch, kv_heads, n), page numbers, the first `listed` of them in use.
    listed, fresh : (batch, kv_heads), pages listed, and the first page that is read without being listed.
    pages : (batch, 1), number of cold pages.

    Raises
    ------
    ValueError : if a number is out of range.
    """
    if not ((listed >= 0) & (listed <= fresh) & (fresh <= pages) & (listed <= lists.shape[2])).all():
        raise ValueError("the saved lists have more pages than the cache")
    counted = np.arange(lists.shape[2]) < listed[..., None]
    if (counted & ((lists < 0) | (lists >= fresh[..., None]))).any():
        raise ValueError("the saved lists name pages that the cache does not have")


def check_fractions(fractions: ArrayLike, kv_heads: int) -> None:
    """Raise ValueError unless there is a fraction of the pages for every KV head, above 0 and at most 1."""
    shares = np.asarray(fractions, np.float64)
    if shares.shape != (kv_heads,) or not ((shares > 0) & (shares <= 1)).all():
        raise ValueError(f"the shares of the pages are {shares.tolist()}: {kv_heads} above 0 and at most 1 are needed")
