"""What the cache of one layer can do, on every backend."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from elastickv.kvcache.attention import Float64
from elastickv.kvcache.tensor_view import Float32, Tensor, TensorView
from elastickv.recipe import AttentionShape, Recipe

if TYPE_CHECKING:
    from typing_extensions import Self

Floats = NDArray[np.floating[Any]]
Lengths = NDArray[np.int64]
CacheState = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class StoredHead:
    """The dequantized tokens of one KV head of one sequence: the codes that the oracle reads, a rotation undone in float64.

    Attributes
    ----------
    cold_keys, cold_values : (stored cold tokens, head_dim) float64, oldest first.
    exact_keys, exact_values : (sinks + recent tokens, head_dim) float64, oldest first.
    """

    cold_keys: Float64
    cold_values: Float64
    exact_keys: Float64
    exact_values: Float64


class LayerCache(Protocol):
    """Keys and values of one layer on one device, in the storage of one recipe.

    There is one verb for each way to store tokens: `prefill` a prompt, `append` one token a sequence, `extend` by a chunk.

    A decode step is one `append` followed by one `decode`. The steps after a prefill are numbered 0, 1, 2, ...; step s is an
    anchor when `recipe.steps_since_refresh(s, anchor_offset)` is 0. `step` is -1 right after `prefill`, `fill_random`,
    `extend`, `crop` or a change by `set_fractions`, and a decode then is an anchor. `decode` changes only what an anchor
    refreshes (the reused output, the list of pages), so repeating it repeats its result.

    The same step can run on the device alone, so that a captured graph can replay it:

    - `prepare_step` makes the checks on the host,
    - `enqueue_step` appends and decodes on the device, without waiting for it,
    - `commit_step` counts the token on the host, or `rollback_step` undoes the step.

    Between `enqueue_step` and `commit_step` or `rollback_step` no other method may be called but `prepare_step`. `lengths` and
    `step` change with `commit_step`.

    Arrays are float32 NumPy arrays on the host. `Tensor` arguments may also be a `TensorView` in the device's memory, with
    fewer channels than `shape.head_dim`; the channels that it lacks are zeros.

    Attributes
    ----------
    shape : batch, heads, head_dim.
    recipe : what is stored in which format.
    dtype : the model's own dtype: 'fp32', 'fp16' or 'bf16'.
    capacity : tokens that a sequence can grow to.
    anchor_offset : 0 to recipe.anchor_every - 1, steps by which the anchors after step 0 come early: layers with different
        offsets (`Recipe.layer_anchor_offset`) have their costly steps at different times.
    lengths : (batch,) int64, tokens of each sequence.
    step : number of the last appended token's step.
    room : tokens that every sequence can still take.
    allocated_bytes : memory that the cache holds, scratch included.
    launch_key : changes whenever `enqueue_step` would launch other kernels or use other memory, so that a captured graph
        of it is no longer valid.
    """

    shape: AttentionShape
    recipe: Recipe
    dtype: str
    capacity: int
    anchor_offset: int

    @property
    def lengths(self) -> Lengths: ...

    @property
    def step(self) -> int: ...

    @property
    def room(self) -> int: ...

    @property
    def allocated_bytes(self) -> int: ...

    @property
    def launch_key(self) -> Hashable: ...

    def prefill(self, keys: Tensor, values: Tensor, lengths: Lengths) -> None:
        """Replace all tokens by a prompt: (batch, kv_heads, tokens, head_dim), of row b the first `lengths[b]` tokens.

        Raises
        ------
        UsageError : if a sequence does not fit the capacity; nothing changes then.
        """

    def fill_random(self, lengths: Lengths, seed: int) -> None:
        """Replace all tokens by seeded random normal ones, generated on the device."""

    def append(self, keys: Float32, values: Float32) -> None:
        """Append one token per sequence: (batch, kv_heads, head_dim). Quantizes the page that leaves the window, if one does.

        Raises
        ------
        UsageError : if a sequence is full.
        """

    def extend(self, keys: Tensor, values: Tensor, lengths: Lengths) -> None:
        """Add a chunk: (batch, kv_heads, tokens, head_dim), of row b the first `lengths[b]` tokens.

        Raises
        ------
        UsageError : if a sequence would outgrow the capacity; nothing is stored then.
        """

    def decode(self, queries: Float32) -> tuple[Floats, Floats]:
        """Attend with one query per sequence.

        Parameters
        ----------
        queries : (batch, query_heads, head_dim); query head h reads KV head h // group.

        Returns
        -------
        outputs : (batch, query_heads, head_dim).
        lse : (batch, query_heads), natural-log sum of exponentials.

        Raises
        ------
        RuntimeError : if the step reuses what an anchor computes, and that anchor was not decoded.
        """

    def prepare_step(self) -> None:
        """Check on the host that the next step can be enqueued. Repeating it has no effect.

        Raises
        ------
        UsageError : if a sequence is full.
        RuntimeError : if the step reuses what an anchor computes, and that anchor was not decoded.
        """

    def enqueue_step(
        self,
        keys: TensorView,
        values: TensorView,
        queries: TensorView,
        query_scale: float,
        outputs: TensorView,
        lse: TensorView,
    ) -> None:
        """Append one token per sequence and decode, on the device alone: a graph capture may record it.

        On a host device the step has run on return.

        Parameters
        ----------
        keys, values : (batch, kv_heads, head_dim), of one dtype with `queries`.
        queries : (batch, query_heads, head_dim); they are multiplied by `query_scale`.
        outputs : receives (batch, query_heads, head_dim), contiguous.
        lse : receives (batch, query_heads) float32, contiguous.
        """

    def commit_step(self) -> None:
        """Count the token of the enqueued step."""

    def rollback_step(self) -> None:
        """Undo an enqueued step that was not committed; without one, do nothing. The step can then be enqueued again.

        What an anchor refreshed is not restored: the step must be enqueued again before steps that reuse it.
        """

    @overload
    def read(self, first: int, last: int) -> tuple[Float32, Float32]: ...
    @overload
    def read(self, first: int, last: int, out: tuple[TensorView, TensorView]) -> None: ...
    def read(self, first: int, last: int, out: tuple[TensorView, TensorView] | None = None) -> tuple[Float32, Float32] | None:
        """Return tokens `first` to `last` - 1 of all rows as they are stored, dequantized and with a rotation undone.

        Parameters
        ----------
        out : receives keys and values, contiguous, instead of new arrays on the host; the copy is enqueued.

        Returns
        -------
        keys, values : (batch, kv_heads, last - first, head_dim) float32; zeros where a row ends earlier or a stride has
            dropped the token. None with `out`.
        """

    def gather(self, rows: Lengths, capacity: int) -> Self:
        """Return a cache of `capacity` tokens whose row i is a copy of row `rows[i]`: codes, scales, lists, window and step.

        The marked state is not copied.
        """

    def reorder(self, rows: Lengths) -> None:
        """Make row i a copy of what row `rows[i]` was, in place; (batch,) int64."""

    def crop(self, lengths: Lengths) -> None:
        """Keep the first `lengths[b]` tokens of row b.

        Tokens that were quantized and are in the window again keep the values of their codes.

        Raises
        ------
        UsageError : if a row would grow, or a stride has dropped tokens that are needed again.
        """

    def set_fractions(self, fractions: Sequence[float]) -> None:
        """Let decodes read these fractions of the cold pages, one for each KV head, instead of the recipe's; 1 reads all.

        No effect where the recipe selects no pages.
        """

    def state(self) -> CacheState:
        """Return copies of all that a cache of the same shape, dtype and recipe needs to continue from here."""

    def load_state(self, state: CacheState) -> None:
        """Replace the contents by what `state` returned.

        Raises
        ------
        ValueError : if the arrays are not those of a cache like this one, or do not fit its capacity.
        """

    def stored(self, row: int, kv_head: int) -> StoredHead:
        """Return what is stored of one KV head of one sequence, dequantized and with a rotation undone."""

    def pages_read(self, row: int, kv_head: int) -> NDArray[np.int64] | None:
        """Return the numbers of the cold pages that the last decode read, ascending; None where the recipe selects none."""

    def mark(self) -> None:
        """Save the present state, to return to while tokens are only added. A new cache is marked in its empty state."""

    def rewind(self) -> None:
        """Return to the marked state.

        Raises
        ------
        RuntimeError : if marked tokens have been overwritten since, by any method other than `append`, `extend` and
            committed steps.
        """

    def raise_non_finite(self) -> None:
        """Raise NonFiniteError, naming sequence, KV head and position, if a NaN or infinity was ever stored."""
