"""What every back end's cache of one layer can do."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from elastickv.kvcache.attention import Float64
from elastickv.recipe import AttentionShape, Recipe

Float32 = NDArray[np.float32]
INT4_KEY_MAX = 65504.0  # the largest half: scales and zeros of int4 keys are halves
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class StoredHead:
    """What a cache holds of one KV head of one sequence, dequantised: the codes that the oracle must be given.

    Attributes
    ----------
    cold_keys, cold_values : (kept cold tokens, head_dim) float64, oldest first.
    exact_keys, exact_values : (sinks + recent tokens, head_dim) float64, oldest first.
    """

    cold_keys: Float64
    cold_values: Float64
    exact_keys: Float64
    exact_values: Float64


class LayerCache(Protocol):
    """Keys and values of one layer on one device, in the storage of one recipe.

    A decode step is one `append` followed by one `decode`. The steps after a prefill are numbered 0, 1, 2, ...; step s is an
    anchor when `recipe.age(s, phase)` is 0. `step` is -1 right after `prefill` or `fill_random`, and a decode then is one.
    `decode` changes nothing but what an anchor refreshes (the reused output, the list of pages), so repeating it repeats its
    result.
    All arrays at this border are float32 NumPy arrays on the host.

    Attributes
    ----------
    shape : batch, heads, head_dim.
    recipe : what is stored how.
    dtype : the model's own dtype: 'fp32', 'fp16' or 'bf16'.
    capacity : tokens that a sequence can grow to.
    phase : 0 to recipe.anchor_every - 1, steps by which the anchors after step 0 come early: layers whose phases differ
        (`Recipe.layer_phase`) have their costly steps apart.
    lengths : (batch,) int64, tokens held by each sequence.
    step : number of the last appended token's step.
    """

    shape: AttentionShape
    recipe: Recipe
    dtype: str
    capacity: int
    anchor_offset: int

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    @property
    def step(self) -> int: ...

    def prefill(self, keys: Float32, values: Float32, lengths: NDArray[np.int64]) -> None:
        """Store (batch, kv_heads, tokens, head_dim) keys and values; row b uses its first `lengths[b]` tokens."""

    def fill_random(self, lengths: NDArray[np.int64], seed: int) -> None:
        """Store seeded random normal tokens, made where they are stored."""

    def append(self, keys: Float32, values: Float32) -> None:
        """Store one token per sequence: (batch, kv_heads, head_dim). Quantises the page that leaves the window, if one does."""

    def decode(self, queries: Float32) -> tuple[Floats, Floats]:
        """Attend with one query per sequence.

        Parameters
        ----------
        queries : (batch, query_heads, head_dim); query head h reads KV head h // group.

        Returns
        -------
        outputs : (batch, query_heads, head_dim).
        lse : (batch, query_heads), natural-log sum of exponentials.
        """

    def stored(self, row: int, kv_head: int) -> StoredHead:
        """Return what is stored of one KV head of one sequence."""

    def pages_read(self, row: int, kv_head: int) -> NDArray[np.int64] | None:
        """Return the numbers of the cold pages that the last decode read, ascending; None where the recipe selects none."""

    def mark(self) -> None:
        """Remember the present state, for as long as tokens are only added: a new cache is marked as it is, empty."""

    def rewind(self) -> None:
        """Return to the marked state; everything appended since is forgotten.

        Raises
        ------
        RuntimeError : if tokens that were marked have been written over since, by `prefill` or `fill_random` (or by what
            `EditableCache` adds: a crop, moved rows, a loaded state, other fractions).
        """

    def raise_non_finite(self) -> None:
        """Raise NonFiniteError, naming sequence, KV head and position, if a NaN or infinity was ever stored."""


def beyond_int4(row: int, kv_head: int, position: int) -> str:
    """Return what to say of a key that is too large for the scales of int4."""
    return (
        f"a key beyond what int4 holds: sequence {row}, KV head {kv_head}, position {position}; "
        f"int4 keys hold magnitudes up to {INT4_KEY_MAX:.0f}: choose another format for K"
    )


def check_marked(marked: bool) -> None:
    """Raise RuntimeError unless what was marked is still there."""
    if not marked:
        raise RuntimeError("there is no mark to return to, or its tokens have been written over since: mark() once more")


def checked_lengths(lengths: NDArray[np.integer[Any]], batch: int) -> NDArray[np.int64]:
    """Return tokens of each sequence as the kernels read them: (batch,) int64 without gaps.

    Raises
    ------
    ValueError : unless there is one whole number from 0 up for each sequence.
    """
    given = np.asarray(lengths)
    used = np.ascontiguousarray(given.astype(np.int64)) if given.dtype.kind in "iu" else None
    if used is None or used.shape != (batch,) or used.min() < 0:
        raise ValueError(f"{given.tolist()} are no lengths of {batch} sequences: give a whole number from 0 up for each")
    return used


def check_shape(array: Float32, shape: tuple[int, ...], name: str) -> None:
    """Raise ValueError if a shape is not the one needed: the kernels take addresses, so a wrong one must stop here."""
    if array.shape != shape:
        raise ValueError(f"{name} of shape {array.shape}: {shape} is needed")
