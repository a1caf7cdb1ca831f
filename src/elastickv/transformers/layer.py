"""One layer of an elastic cache: a prompt that is stored, tokens that are appended, chunks that attend to what is stored."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import CacheLayerMixin

from elastickv.errors import NonFiniteError, UsageError
from elastickv.recipe import AttentionShape
from elastickv.transformers.attention import Call, Pending, carrying
from elastickv.transformers.budget import Reading, scaled
from elastickv.transformers.call_checks import check_call, check_tokens
from elastickv.transformers.checks import CacheChecks
from elastickv.transformers.chunked_attention import Scoring, attend_stored
from elastickv.transformers.config import ElasticConfig
from elastickv.transformers.device_events import now
from elastickv.transformers.device_map import layers_beside
from elastickv.transformers.finite_check import check_finite
from elastickv.transformers.layer_storage import LayerStorage, dtype_name, new_store, padded_head_dim
from elastickv.transformers.mask_reading import MaskedPositions, real_tokens, visible_new
from elastickv.transformers.memory import check_memory, first_capacity, trim_heap
from elastickv.transformers.padding import Padding
from elastickv.transformers.report import Ledger

CHECK_EVERY = 32  # decodes from one look for values that are not finite to the next, where the host would wait for it


class ElasticLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer with full attention.

    Its life: empty; `held` in the model's dtype while a prompt with `prefill='exact'` lasts; then in the `store`. What
    Transformers calls the length counts padding, what the store holds does not.

    A decode is three parts: `begin_step` and `end_step` are the host's, `queue_step` is all that a captured graph replays.

    Attributes
    ----------
    capped : whether the model caps its scores; None until its attention was first asked for.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, number: int, plan: ElasticConfig, guard: CacheChecks, ledger: Ledger) -> None:
        super().__init__()
        self.number, self._plan, self._guard, self._ledger = number, plan, guard, ledger
        self.reset()

    def reset(self) -> None:
        """Forget all tokens and free what held them."""
        self._plan.backends.note_use()
        self.store: LayerStorage | None = None
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None
        self.slots = Padding()
        self.batch = 0
        self.capped: bool | None = None
        self._reading: Reading | None = None
        self._uneven: tuple[bool, ...] = ()
        self.is_initialized = False

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` takes tokens back: not where a stride has dropped what would be needed again.

        Transformers asks before it lets an assistant draft. A draft is shorter than the window, which is exact, but for a page
        that was quantised meanwhile: its tokens keep the values that their codes stand for.
        """
        budget = self._plan.budget
        return budget is None or budget.recipes[self.number].stride == 1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the store is made when the prompt is known."""

    def offload(self) -> None:
        """Do nothing: what is stored stays on its device."""

    def prefetch(self) -> None:
        """Do nothing: what is stored stays on its device."""

    def get_seq_length(self) -> int:
        """Return the places so far, padding included."""
        return self.slots.length

    def get_max_length(self) -> int:
        """Return the capacity, or -1 where there is none."""
        return self._plan.capacity or -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (keys, first key) that a mask has to cover: the new tokens, for what is stored knows its padding."""
        self._guard.check_answered()
        if self.held is not None and query_length > 1:
            return self.slots.length + query_length, 0
        return query_length, MaskedPositions.of(self.slots)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new tokens, (batch, kv_heads, new, head_dim), and return them so that attention finds this layer."""
        batch, dtype, device = self.batch if self.slots.length else None, None, None
        if self.store is not None:
            dtype, device = self.store.cache.dtype, self.store.device
        elif self.held is not None:
            device = self.held[0].device
        check_tokens(key_states, value_states, batch, dtype, device)
        pending = Pending(self, key_states, value_states)
        self._guard.expect(pending)
        self.is_initialized = True
        return carrying(key_states, pending), carrying(value_states, pending)

    def attend(self, pending: Pending, call: Call) -> torch.Tensor:
        """Attend with the queries of the new tokens, and store these.

        Returns
        -------
        outputs : (batch, new, query_heads, head_dim) of the query's dtype.
        """
        self._guard.take(pending, call.module)
        if self._guard.recording is not None:
            queued = self.queue_step(pending, call)
            self._guard.recording.queued.append(self)
            return queued
        check_call(call, self._guard.model_name, self.number)
        self.capped = call.softcap is not None
        new = call.query.shape[2]
        real = real_tokens(call.mask, new, call.query.shape[0], self.slots)
        self._check_room(real, call.query.shape[0], new)
        self.batch = call.query.shape[0]
        output = self._attend(pending, call, real)
        if new > 1 or self.store is None or self.store.on_host:
            self._check_queries(call.query, real)
        return output

    def _attend(self, pending: Pending, call: Call, real: NDArray[np.bool_] | None) -> torch.Tensor:
        new = call.query.shape[2]
        if self.store is None and (self.held is None or new > 1):
            return self._prompt(pending, call, real)
        if self.store is None:
            self._seal(call)
        assert self.store is not None
        if new == 1 and real is None and not self.capped:
            return self._decode(pending, call)
        visible, scoring = visible_new(call.mask, new), Scoring(call.scaling, call.softcap, call.sinks)
        output = attend_stored(call.query, pending.keys, pending.values, visible, self.store, scoring).transpose(1, 2)
        self._ledger.note_chunk(self.number)
        self.store.extend(*_without_padding(pending.keys, pending.values, real))
        self.raise_non_finite()
        self.slots.add(new, real)
        return output.to(call.query.dtype).contiguous()

    def _check_queries(self, queries: torch.Tensor, real: NDArray[np.bool_] | None) -> None:
        """Raise NonFiniteError if one of the new tokens has a query that is not finite: its output is not, either."""
        before = self.lengths - (queries.shape[2] if real is None else real.sum(axis=1))
        with self._placed():
            check_finite("a query", "query head", (queries,), real, before)

    @contextmanager
    def _placed(self) -> Iterator[None]:
        """Let a NonFiniteError that is raised inside name this layer."""
        try:
            yield
        except NonFiniteError as error:
            raise NonFiniteError(f"layer {self.number}{self._guard.ranks}: {error}") from None

    def check_step(self) -> None:
        """Raise UsageError if one more token a row goes beyond the capacity or the model's positions."""
        self._check_room(None, self.batch, 1)

    def _check_room(self, real: NDArray[np.bool_] | None, batch: int, new: int) -> None:
        """Raise UsageError if the new tokens go beyond the capacity or the model's positions."""
        capacity, positions = self._plan.capacity, self._plan.sizes.max_positions
        if capacity is None and positions is None:
            return
        held = np.zeros(batch, np.int64) if not self.slots.length else self.lengths
        longest = int((held + (new if real is None else real.sum(axis=1))).max())
        self._plan.check_length(longest, int(held.max()))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, padding not counted: (batch,) int64."""
        if self.store is not None:
            return self.store.lengths
        return np.asarray(self.slots.real(self.batch).sum(axis=1), np.int64)

    def _prompt(self, pending: Pending, call: Call, real: NDArray[np.bool_] | None) -> torch.Tensor:
        """Attend exactly to the prompt so far, and store it unless it is to stay exact until it ends."""
        device = pending.keys.device
        self._ledger.begin(self.number, now(device))
        keys, values = pending.keys, pending.values
        if self.held is not None:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.held, (keys, values), strict=True))
        output = call.stock(keys, values)
        self.slots.add(call.query.shape[2], real)
        self.held = (keys, values)
        if self._plan.prefill == "exact":
            self.raise_non_finite()
        else:
            self._seal(call)
        self._ledger.end_prompt(now(device))
        return output

    def _seal(self, call: Call) -> None:
        """Store what is held: cold tokens in their formats, the rest in 16 bit or the model's dtype."""
        assert self.held is not None
        keys, values = self.held
        device, started = keys.device, now(keys.device)
        real = self.slots.real(self.batch)
        keys, values, lengths = _without_padding(keys, values, None if real.all() else real)
        heads, head_dim = keys.shape[1], keys.shape[3]
        dtype = dtype_name(keys.dtype)
        longest = int(lengths.max())
        budget = self._plan.settle(longest, dtype)
        recipe = self._guard.ranks.share(budget.recipes[self.number], self._plan.sizes.kv_heads, heads)
        shape = AttentionShape(self.batch, call.query.shape[1], heads, padded_head_dim(head_dim))
        recipe.check_shape(shape.head_dim, heads)
        backend = self._plan.backends.at(keys.device)
        capacity = first_capacity(self._plan, longest, self.slots.length)
        beside = layers_beside(self.number, self._plan.sizes.elastic, self._guard.device_map)
        if self.number == beside[0]:
            check_memory(backend, self._plan, self._guard.ranks, shape, capacity, dtype, beside)
        store = new_store(
            self._plan.backends, shape, capacity, dtype, recipe, head_dim, keys.device, budget.anchor_offset(self.number)
        )
        store.extend(keys, values, lengths)
        self.store, self.held = store, None
        self.raise_non_finite()
        del keys, values
        if device.type == "cpu":
            trim_heap()
        self._ledger.quantized(started, now(device))

    def _decode(self, pending: Pending, call: Call) -> torch.Tensor:
        self.begin_step(self._plan.reading(int(self.lengths.max()) + 1))
        output = self.queue_step(pending, call)
        self.end_step()
        if self.check_is_due:
            self.raise_non_finite()
        return output

    def begin_step(self, reading: Reading) -> None:
        """Make room for a token a row, and let the decode read what `reading` says. Nothing is counted yet."""
        assert self.store is not None
        if reading is not self._reading:
            cache = self.store.cache
            recipe = scaled(cache.recipe, reading.scale)
            self.store.set_fractions([recipe.fraction(head) for head in range(cache.shape.kv_heads)])
            self._reading = reading
            assert self._plan.budget is not None
            self._uneven = self._guard.ranks.uneven(scaled(self._plan.budget.recipes[self.number], reading.scale))
        # Last: it counts on what the step will be.
        self.store.prepare_step()

    def queue_step(self, pending: Pending, call: Call) -> torch.Tensor:
        """Store a token a row and attend: (batch, 1, query_heads, head_dim). Nothing that the host would have to wait for."""
        assert self.store is not None
        found = self.store.enqueue_step(pending.keys, pending.values, call.query[:, :, 0], call.scaling)
        output = Scoring(call.scaling, sinks=call.sinks).with_sinks(*found)
        return output.unsqueeze(1).to(call.query.dtype).contiguous()

    def end_step(self) -> None:
        """Count what `queue_step` stored."""
        assert self.store is not None and self._reading is not None
        self.store.commit_step()
        self._ledger.note_step(self.number, self.store.cache, self._reading.scale)
        self.slots.add(1, None)

    @property
    def launch_key(self) -> Hashable:
        """What a graph of `queue_step` is good for. It changes on all ranks or on none."""
        assert self.store is not None
        return self.store.launch_key, self._uneven

    @property
    def check_is_due(self) -> bool:
        """Whether it is time to look for values that are not finite."""
        if self.store is None:
            return False
        ends = self.slots.length == self._plan.expected
        return self.store.on_host or ends or self.store.cache.step % CHECK_EVERY == CHECK_EVERY - 1

    def go_on(self, store: LayerStorage) -> None:
        """Take over a store that was filled under the plan's present reading."""
        self.store, self._reading = store, self._plan.present

    def raise_non_finite(self) -> None:
        """Raise NonFiniteError, naming layer, sequence, KV head and position, if a NaN or infinity was ever taken."""
        with self._placed():
            if self.store is not None:
                self.store.raise_non_finite()
            elif self.held is not None:
                real = self.slots.real(self.batch)
                check_finite("a value", "KV head", self.held, real, np.zeros(self.batch, np.int64))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row i what row `beam_idx[i]` was."""
        self._take_rows(beam_idx.detach().to("cpu", torch.int64).numpy())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._take_rows(np.repeat(np.arange(self.batch), repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, numbers or booleans."""
        self._take_rows(np.arange(self.batch)[np.asarray(indices.detach().cpu())])

    def _take_rows(self, rows: NDArray[np.int64]) -> None:
        if not self.slots.length:
            return
        self.raise_non_finite()  # while rows have the numbers that it names
        if self.held is not None:
            index = torch.as_tensor(rows, device=self.held[0].device)
            self.held = (self.held[0].index_select(0, index), self.held[1].index_select(0, index))
        if self.store is not None:
            self.store.gather(rows)
        self.slots.gather(rows)
        self.batch = len(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` places.

        Tokens that were quantised and lie in the window again keep the values that their codes stand for; the next decode
        selects afresh.

        Raises
        ------
        UsageError : if the number is positive, larger than the length, or a stride has dropped tokens needed again.
        """
        count = -int(tokens_to_remove)
        if count < 0 or count > self.slots.length:
            raise UsageError(
                f"crop({tokens_to_remove}) of {self.slots.length} tokens: give minus the number of tokens to remove"
            )
        if count == 0:
            return
        if count == self.slots.length:
            self.reset()
            return
        before = self.slots.copy()
        lost = self.slots.remove(count, self.batch)
        if self.held is not None:
            self.held = (self.held[0][:, :, :-count], self.held[1][:, :, :-count])
        if self.store is not None:
            try:
                self.store.drop(lost)
            except UsageError:
                self.slots = before
                raise

    def copy(self, plan: ElasticConfig, guard: CacheChecks, ledger: Ledger) -> ElasticLayer:
        """Return a layer of the same tokens that shares nothing with this one but what it is told to."""
        other = ElasticLayer(self.number, plan, guard, ledger)
        other.store = None if self.store is None else self.store.copy(plan.backends)
        other.held = None if self.held is None else (self.held[0].clone(), self.held[1].clone())
        other.slots, other.batch, other.capped = self.slots.copy(), self.batch, self.capped
        other._reading, other._uneven, other.is_initialized = self._reading, self._uneven, self.is_initialized
        return other


def _without_padding(
    keys: torch.Tensor, values: torch.Tensor, real: NDArray[np.bool_] | None
) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]:
    """Return keys and values with every row's tokens first, and how many there are."""
    batch, heads, tokens, dim = keys.shape
    if real is None:
        return keys, values, np.full(batch, tokens, np.int64)
    lengths = real.sum(axis=1).astype(np.int64)
    order = np.argsort(~real, axis=1, kind="stable")[:, : max(1, int(lengths.max()))]
    index = torch.as_tensor(order, device=keys.device)[:, None, :, None].expand(-1, heads, -1, dim)
    return keys.gather(2, index), values.gather(2, index), lengths
