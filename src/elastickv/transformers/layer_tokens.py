"""The tokens of one layer: held in the model's dtype during a prompt, then stored in a backend; counted, edited, checked."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import CacheLayerMixin

from elastickv.errors import NonFiniteError, UsageError
from elastickv.recipe import PAGE_TOKENS, AttentionShape, Recipe, regions
from elastickv.recipe.shape import padded_head_dim
from elastickv.transformers.budget import Reading, scaled
from elastickv.transformers.cache_checks import CacheChecks, check_finite
from elastickv.transformers.cache_report import Ledger
from elastickv.transformers.config import ElasticConfig
from elastickv.transformers.device_events import now
from elastickv.transformers.layer_storage import LayerStorage, new_store
from elastickv.transformers.memory import check_memory, first_capacity, trim_heap
from elastickv.transformers.padding import Padding, without_padding
from elastickv.transformers.placement import layers_on_same_device
from elastickv.transformers.torch_dtypes import TORCH_DTYPES, dtype_name

SAMPLED_ROWS, SAMPLED_PAGES = 2, 4  # of a prompt, by which the format of its keys is judged
LEAST_SAMPLED_TOKENS = 8  # the range of fewer says little of a channel's
CHECK_EVERY = 32  # decodes between two checks for NaNs and infinities, where a check makes the host wait


class LayerTokens(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer with full attention.

    A layer is empty, then has a prompt `held` in the model's dtype (with `prefill='exact'`, for several passes), then has its
    tokens in the `store`. The length that Transformers reads counts padding; the store has none.

    Attributes
    ----------
    number : the layer's index in the model.
    capped : whether the model caps its scores; None until the layer has attended.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, number: int, config: ElasticConfig, checks: CacheChecks, ledger: Ledger) -> None:
        super().__init__()
        self.number, self._config, self._checks, self._ledger = number, config, checks, ledger
        self.reset()

    def reset(self) -> None:
        """Forget all tokens and free their memory."""
        self._config.backends.note_use()
        self.store: LayerStorage | None = None
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None
        self.padding = Padding()
        self.batch = 0
        self.capped: bool | None = None
        self._reading: Reading | None = None
        self._uneven: tuple[bool, ...] = ()
        self.is_initialized = False

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can remove tokens: not where a stride has dropped tokens that would be needed again.

        Transformers reads this before assisted decoding. A draft is shorter than the exact window, except that a page may have
        been quantized in the meantime: its tokens keep the values that their codes stand for.
        """
        budget = self._config.budget
        return budget is None or budget.recipes[self.number].stride == 1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the store is made when the prompt is known."""

    def offload(self) -> None:
        """Do nothing: stored tokens stay on their device."""

    def prefetch(self) -> None:
        """Do nothing: stored tokens stay on their device."""

    def get_seq_length(self) -> int:
        """Return the positions so far, padding included."""
        return self.padding.length

    def get_max_length(self) -> int:
        """Return the capacity, or -1 where there is none."""
        return self._config.capacity or -1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, padding not counted: (batch,) int64."""
        if self.store is not None:
            return self.store.lengths
        return np.asarray(self.padding.real(self.batch).sum(axis=1), np.int64)

    def dequantized(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return keys and values, (batch, kv_heads, positions, head_dim) each in the model's dtype; None while it is empty.

        Raises
        ------
        UsageError : if a stride has dropped tokens.
        """
        if self.store is None:
            return self.held or (None, None)
        cache = self.store.cache
        if cache.recipe.stride > 1:
            raise UsageError(f"layer {self.number} has dropped tokens ({cache.recipe}): its keys and values cannot be read")
        real = torch.as_tensor(self.padding.real(self.batch), device=self.store.device)
        stored = self.store.read(0, int(self.lengths.max()))
        # A row's tokens are stored without its padding.
        index = (real.cumsum(dim=1) - 1).clamp(min=0)[:, None, :, None].expand(-1, stored[0].shape[1], -1, self.store.head_dim)
        keys, values = (tensor.gather(2, index) * real[:, None, :, None] for tensor in stored)
        dtype = TORCH_DTYPES[cache.dtype]
        return keys.to(dtype), values.to(dtype)

    def check_room(self, real: NDArray[np.bool_] | None, batch: int, new: int) -> None:
        """Raise UsageError if `new` positions, of which `real` are tokens, exceed the capacity or the model's positions."""
        capacity, positions = self._config.capacity, self._config.sizes.max_positions
        if capacity is None and positions is None:
            return
        before = np.zeros(batch, np.int64) if not self.padding.length else self.lengths
        longest = int((before + (new if real is None else real.sum(axis=1))).max())
        self._config.check_length(longest, int(before.max()))

    def with_held(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the held tokens followed by new ones."""
        if self.held is None:
            return keys, values
        return torch.cat((self.held[0], keys), dim=2), torch.cat((self.held[1], values), dim=2)

    def hold(self, keys: torch.Tensor, values: torch.Tensor, real: NDArray[np.bool_] | None = None) -> None:
        """Hold a prompt so far in the model's dtype.

        Parameters
        ----------
        keys, values : (batch, kv_heads, positions, head_dim), of all positions.
        real : (batch, new), True where one of the positions that are not counted yet is a token. None: all are.
        """
        self.batch, self.is_initialized = keys.shape[0], True
        self.padding.add(keys.shape[2] - self.padding.length, real)
        self.held = (keys, values)

    def store_held(self, query_heads: int) -> None:
        """Move the held tokens into a new store: cold tokens in their formats, the rest in 16 bit or the model's dtype.

        Raises
        ------
        UsageError : if memory does not suffice.
        NonFiniteError : if a token is not finite.
        """
        assert self.held is not None
        keys, values = self.held
        device, started, config = keys.device, now(keys.device), self._config
        real = self.padding.real(self.batch)
        keys, values, lengths = without_padding(keys, values, None if real.all() else real)
        heads, head_dim = keys.shape[1], keys.shape[3]
        dtype = dtype_name(keys.dtype)
        longest = int(lengths.max())
        budget = config.settle(longest, dtype, device.type)
        if self._checks.ranks.count == 1 and config.judges_keys(self.number):
            budget = config.suit_keys(self.number, sampled_keys(keys, lengths, budget.recipes[self.number]))
        recipe = self._checks.ranks.share(budget.recipes[self.number], config.sizes.kv_heads, heads)
        shape = AttentionShape(self.batch, query_heads, heads, padded_head_dim(head_dim))
        recipe.check_shape(shape.head_dim, heads)
        capacity = first_capacity(config, longest, self.padding.length)
        same_device = layers_on_same_device(self.number, config.sizes.elastic, self._checks.device_map)
        if self.number == same_device[0]:
            check_memory(config.backends.at(device), config, self._checks.ranks, shape, capacity, dtype, same_device)
        statistics = self._checks.ranks.share_heads(config.statistics_of(self.number), heads)
        offset = budget.anchor_offset(self.number)
        store = new_store(config.backends, shape, capacity, dtype, recipe, head_dim, device, offset, statistics)
        store.extend(keys, values, lengths)
        self.store, self.held = store, None
        self.raise_non_finite()
        del keys, values
        if device.type == "cpu":
            trim_heap()
        self._ledger.quantized(started, now(device))

    def begin_step(self, reading: Reading) -> None:
        """Make room for one more token a row, and set what the decode reads. Nothing is counted yet."""
        assert self.store is not None
        if reading is not self._reading:
            cache = self.store.cache
            recipe = scaled(cache.recipe, reading.scale)
            self.store.set_fractions([recipe.fraction(head) for head in range(cache.shape.kv_heads)])
            self._reading = reading
            assert self._config.budget is not None
            self._uneven = self._checks.ranks.uneven(scaled(self._config.budget.recipes[self.number], reading.scale))
        # Last, because the store prepares for the fractions that were set above.
        self.store.prepare_step()

    def end_step(self) -> None:
        """Count the token that the step stored."""
        assert self.store is not None and self._reading is not None
        self.store.commit_step()
        self._ledger.note_step(self.number, self.store.cache, self._reading.scale)
        self.padding.add(1, None)

    @property
    def launch_key(self) -> Hashable:
        """What a graph of the step depends on. It changes on all ranks or on none."""
        assert self.store is not None
        return self.store.launch_key, self._uneven

    @property
    def check_is_due(self) -> bool:
        """Whether it is time to check stored values for NaNs and infinities."""
        if self.store is None:
            return False
        ends = self.padding.length == self._config.expected
        return self.store.on_host or ends or self.store.cache.step % CHECK_EVERY == CHECK_EVERY - 1

    def restore(
        self, padding: Padding, batch: int, held: tuple[torch.Tensor, torch.Tensor] | None, store: LayerStorage | None
    ) -> None:
        """Replace an empty layer's state by a saved one; its store was filled under the config's present reading."""
        self.padding, self.batch, self.held, self.is_initialized = padding, batch, held, True
        if store is not None:
            self.store, self._reading = store, self._config.present

    @contextmanager
    def naming_layer(self) -> Iterator[None]:
        """Add this layer to the message of a NonFiniteError that is raised inside the block."""
        try:
            yield
        except NonFiniteError as error:
            raise NonFiniteError(f"layer {self.number}{self._checks.ranks}: {error}") from None

    def raise_non_finite(self) -> None:
        """Raise NonFiniteError, naming layer, sequence, KV head and position, if a NaN or infinity was ever stored."""
        with self.naming_layer():
            if self.store is not None:
                self.store.raise_non_finite()
            elif self.held is not None:
                real = self.padding.real(self.batch)
                check_finite("a value", "KV head", self.held, real, np.zeros(self.batch, np.int64))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace row i by row `beam_idx[i]`."""
        self._take_rows(beam_idx.detach().to("cpu", torch.int64).numpy())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._take_rows(np.repeat(np.arange(self.batch), repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, numbers or booleans."""
        self._take_rows(np.arange(self.batch)[np.asarray(indices.detach().cpu())])

    def _take_rows(self, rows: NDArray[np.int64]) -> None:
        if not self.padding.length:
            return
        self.raise_non_finite()  # before rows are renumbered: the message names one
        if self.held is not None:
            index = torch.as_tensor(rows, device=self.held[0].device)
            self.held = (self.held[0].index_select(0, index), self.held[1].index_select(0, index))
        if self.store is not None:
            self.store.gather(rows)
        self.padding.gather(rows)
        self.batch = len(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` positions.

        Tokens that were quantized and are in the window again keep the values that their codes stand for; the next decode makes
        a new selection.

        Raises
        ------
        UsageError : if the number is positive, larger than the length, or a stride has dropped tokens needed again.
        """
        count = -int(tokens_to_remove)
        if count < 0 or count > self.padding.length:
            raise UsageError(
                f"crop({tokens_to_remove}) of {self.padding.length} tokens: give minus the number of tokens to remove"
            )
        if count == 0:
            return
        if count == self.padding.length:
            self.reset()
            return
        before = self.padding.copy()
        lost = self.padding.remove(count, self.batch)
        if self.held is not None:
            self.held = (self.held[0][:, :, :-count], self.held[1][:, :, :-count])
        if self.store is not None:
            try:
                self.store.drop(lost)
            except UsageError:
                self.padding = before
                raise

    def copy(self, config: ElasticConfig, checks: CacheChecks, ledger: Ledger) -> LayerTokens:
        """Return a layer with copies of the tokens, which shares only the arguments with others."""
        other = type(self)(self.number, config, checks, ledger)
        other.store = None if self.store is None else self.store.copy(config.backends)
        other.held = None if self.held is None else (self.held[0].clone(), self.held[1].clone())
        other.padding, other.batch, other.capped = self.padding.copy(), self.batch, self.capped
        other._reading, other._uneven, other.is_initialized = self._reading, self._uneven, self.is_initialized
        return other


def sampled_keys(keys: torch.Tensor, lengths: NDArray[np.int64], recipe: Recipe) -> NDArray[np.float32]:
    """Return pages of keys as a cache would store them, of the longest rows.

    They are evenly spaced over a row's cold tokens, or over all if none is cold. A row that fills no page repeats its tokens in
    one; of fewer than `LEAST_SAMPLED_TOKENS` there is no sample.

    Parameters
    ----------
    keys : (batch, kv_heads, tokens, head_dim), the tokens of a row first.
    lengths : (batch,) tokens of each row.

    Returns
    -------
    sample : (kv_heads, tokens, head_dim), float32, rounded to bfloat16 if the model is float32.
    """
    longest = np.argsort(-lengths, kind="stable")[:SAMPLED_ROWS]
    sampled = [
        keys[row].index_select(1, torch.as_tensor(_sampled_tokens(int(lengths[row]), recipe), device=keys.device))
        for row in longest.tolist()
        if lengths[row] >= LEAST_SAMPLED_TOKENS
    ]
    sample = torch.cat(sampled, dim=1) if sampled else keys[0, :, :0]
    sample = sample.to(torch.bfloat16) if sample.dtype == torch.float32 else sample
    by_head: NDArray[np.float32] = sample.float().cpu().numpy()
    return by_head


def _sampled_tokens(length: int, recipe: Recipe) -> NDArray[np.int64]:
    split = regions(length, recipe.sinks, recipe.window)
    first, pages = (split.sinks, split.cold // PAGE_TOKENS) if split.cold else (0, length // PAGE_TOKENS)
    if not pages:
        return np.arange(PAGE_TOKENS) % length
    chosen = np.unique(np.linspace(0, pages - 1, min(pages, SAMPLED_PAGES)).astype(np.int64))
    tokens: NDArray[np.int64] = (first + chosen[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)).ravel()
    return tokens
