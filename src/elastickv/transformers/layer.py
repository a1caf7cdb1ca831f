"""One layer of an elastic cache attends: prefill a prompt, append a token a row, extend by chunks that read what is stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elastickv.transformers.attention import Call, Pending, carrying
from elastickv.transformers.cache_checks import check_call, check_finite, check_no_weights, check_tokens
from elastickv.transformers.chunked_attention import Scoring, attend_stored
from elastickv.transformers.device_events import now
from elastickv.transformers.layer_tokens import LayerTokens
from elastickv.transformers.padding import MaskedPositions, real_tokens, visible_new, without_padding


class ElasticLayer(LayerTokens):
    """A layer with full attention, as Transformers and the attention function call it.

    `update` takes new tokens and `attend` their queries. What is stored then depends on the pass: `prefill` while the layer has
    no store, `append` for one token a row, `extend` for several. An append has three parts: `begin_step` and `end_step` run on
    the host, `queue_step` is what a captured graph replays.
    """

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (keys, first key) that a mask has to cover: only new tokens, because the padding of stored ones is known."""
        self._checks.check_answered()
        if self.held is not None and query_length > 1:
            return self.padding.length + query_length, 0
        return query_length, MaskedPositions.of(self.padding)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new tokens, (batch, kv_heads, new, head_dim), and return them so that attention finds this layer."""
        batch, dtype, device = self.batch if self.padding.length else None, None, None
        if self.store is not None:
            dtype, device = self.store.cache.dtype, self.store.device
        elif self.held is not None:
            device = self.held[0].device
        check_tokens(key_states, value_states, batch, dtype, device)
        pending = Pending(self, key_states, value_states)
        self._checks.expect(pending)
        self.is_initialized = True
        return carrying(key_states, pending), carrying(value_states, pending)

    def attend(self, pending: Pending, call: Call) -> torch.Tensor:
        """Attend with the queries of the new tokens, and store these.

        Returns
        -------
        outputs : (batch, new, query_heads, head_dim) of the query's dtype.
        """
        self._checks.take(pending, call.module)
        check_no_weights(call)
        if self._checks.recording is not None:
            queued = self.queue_step(pending, call)
            self._checks.recording.queued.append(self)
            return queued
        check_call(call, self._checks.model_name, self.number)
        self.capped = call.softcap is not None
        batch, new = call.query.shape[0], call.query.shape[2]
        real = real_tokens(call.mask, new, batch, self.padding)
        self.check_room(real, batch, new)
        self.batch = batch
        output = self._attend(pending, call, real)
        if new > 1 or self.store is None or self.store.on_host:
            self._check_queries(call.query, real)
        return output

    def _attend(self, pending: Pending, call: Call, real: NDArray[np.bool_] | None) -> torch.Tensor:
        new = call.query.shape[2]
        if self.store is None and (self.held is None or new > 1):
            return self.prefill(pending, call, real)
        if self.store is None:
            self.store_held(call.query.shape[1])
        if new == 1 and real is None and not self.capped:
            return self.append(pending, call)
        return self.extend(pending, call, real)

    def prefill(self, pending: Pending, call: Call, real: NDArray[np.bool_] | None) -> torch.Tensor:
        """Attend exactly to the prompt so far, and store it; under `prefill='exact'`, only hold it."""
        device = pending.keys.device
        self._ledger.begin(self.number, now(device))
        keys, values = self.with_held(pending.keys, pending.values)
        output = call.exact(keys, values)
        self.hold(keys, values, real)
        del keys, values
        if self._config.prefill == "exact":
            self.raise_non_finite()
        else:
            self.store_held(call.query.shape[1])
        self._ledger.end_prompt(now(device))
        return output

    def append(self, pending: Pending, call: Call) -> torch.Tensor:
        """Store a token a row and attend to what the recipe selects."""
        self.begin_step(self._config.reading(int(self.lengths.max()) + 1))
        output = self.queue_step(pending, call)
        self.end_step()
        if self.check_is_due:
            self.raise_non_finite()
        return output

    def extend(self, pending: Pending, call: Call, real: NDArray[np.bool_] | None) -> torch.Tensor:
        """Attend to all stored tokens and the new ones, then store these."""
        assert self.store is not None
        new = call.query.shape[2]
        visible, scoring = visible_new(call.mask, new), Scoring(call.scaling, call.softcap, call.sinks)
        output = attend_stored(call.query, pending.keys, pending.values, visible, self.store, scoring).transpose(1, 2)
        self._ledger.note_chunk(self.number)
        self.store.extend(*without_padding(pending.keys, pending.values, real))
        self.raise_non_finite()
        self.padding.add(new, real)
        return output.to(call.query.dtype).contiguous()

    def queue_step(self, pending: Pending, call: Call) -> torch.Tensor:
        """Store a token a row and attend: (batch, 1, query_heads, head_dim). The host never waits for the device."""
        assert self.store is not None
        outputs, lse = self.store.enqueue_step(pending.keys, pending.values, call.query[:, :, 0], call.scaling)
        output = Scoring(call.scaling, sinks=call.sinks).with_sinks(outputs, lse)
        return output.unsqueeze(1).to(call.query.dtype).contiguous()

    def _check_queries(self, queries: torch.Tensor, real: NDArray[np.bool_] | None) -> None:
        """Raise NonFiniteError if the query of a new token is not finite: its output is not finite either."""
        before = self.lengths - (queries.shape[2] if real is None else real.sum(axis=1))
        with self.naming_layer():
            check_finite("a query", "query head", (queries,), real, before)
