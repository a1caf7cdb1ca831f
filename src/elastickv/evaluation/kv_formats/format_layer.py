"""Layers of Transformers' cache whose tokens have been through a KV format, or have 16 bits.

What comes back from a format is held in the model's dtype, so that these layers save no memory and no time. They only grow.
"""

from itertools import product
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from elastickv.evaluation.kv_formats.reference_format import ReferenceFormat, StoredPlane
from elastickv.evaluation.masked_attention import masked_attention
from elastickv.evaluation.prefill import Tensor
from elastickv.transformers.attention import Call, Pending, carrying


class SixteenBitLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in 16 bits: those of a float32 model are rounded to bfloat16, as an ElasticCache rounds exact tokens.

    Selections read these, so that they differ from an ElasticCache by what they leave out alone.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, kv_heads, new, head_dim) tokens and return all."""
        keys, values = super().update(_in_16_bits(key_states), _in_16_bits(value_states), *args, **kwargs)
        return keys, values


class FormatLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values as attention reads them: rounded to a format once, as soon as they are old enough, and not before.

    Several tokens that follow others are as many steps: each reads what has been rounded by then.

    Attributes
    ----------
    number : the layer's index in the model.
    """

    def __init__(self, stored_as: ReferenceFormat, number: int = 0) -> None:
        super().__init__()
        self.number = number
        self._key_store = _Store(stored_as.keys, stored_as.sinks)
        self._value_store = _Store(stored_as.values, stored_as.sinks)
        self._seen: Tensor = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, kv_heads, new, head_dim) tokens and return all, with those that are old enough rounded."""
        new, before = key_states.shape[2], self.get_seq_length()
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if before and new > 1:
            return self._by_steps(keys, values, before)
        self._key_store.round_old(keys)
        self._value_store.round_old(values)
        return keys, values

    def _by_steps(self, keys: Tensor, values: Tensor, before: int) -> tuple[Tensor, Tensor]:
        """Round what the last of the steps finds old enough; return all versions that a step reads, for `attend`.

        A token may be read exactly by one step and rounded by a later one, its key earlier than its value or later.
        """
        steps = range(before + 1, keys.shape[2] + 1)
        stores = (self._key_store, self._value_store)
        # For each step the number of the first token that is not in the format, of K and of V.
        ends = [[store.end(tokens) for tokens in steps] for store in stores]
        settled = min(steps[0], *(end[0] for end in ends))
        exact = [states[:, :, settled:].clone() for states in (keys, values)]
        for store, states in zip(stores, (keys, values), strict=True):
            store.round_old(states, len(steps))
        tokens = torch.arange(settled, keys.shape[2], device=keys.device)
        visible = tokens < torch.tensor(steps, device=keys.device)[:, None]
        rounded = [tokens < torch.tensor(end, device=keys.device)[:, None] for end in ends]
        read = [[keys[:, :, :settled]], [values[:, :, :settled]]]
        seen = [visible.new_ones(len(steps), settled)]
        for versions in product((True, False), repeat=2):
            of_version = visible & (rounded[0] == versions[0]) & (rounded[1] == versions[1])
            any_step = of_version.any(0)
            if any_step.any():
                for part, states, old, is_rounded in zip(read, (keys, values), exact, versions, strict=True):
                    part.append((states[:, :, settled:] if is_rounded else old)[:, :, any_step])
                seen.append(of_version[:, any_step])
        self._seen = torch.cat(seen, 1)
        pending = Pending(self, *(torch.cat(part, 2) for part in read))
        return carrying(pending.keys, pending), carrying(pending.values, pending)

    def attend(self, pending: Pending, call: Call) -> torch.Tensor:
        """Attend to what each step reads: (batch, new, query_heads, head_dim) of the query's dtype."""
        return masked_attention(call, pending.keys, pending.values, self._seen)


def _in_16_bits(states: Tensor) -> Tensor:
    return states.bfloat16().float() if states.dtype == torch.float32 else states


class _Store:
    """How many tokens of K, or of V, are in the format so far, and the layer's scale where it has one."""

    def __init__(self, plane: StoredPlane, sinks: int) -> None:
        self._plane, self._sinks = plane, sinks
        self._tokens = 0
        self._scale: Tensor | None = None

    def end(self, tokens: int) -> int:
        """Return the number of the first token after the stored ones, once there are `tokens`."""
        return self._sinks + self._plane.stored_tokens(tokens, self._sinks)

    def round_old(self, states: Tensor, steps: int = 1) -> None:
        """Round in place what has become old enough in the last steps; before them, this was called for all earlier tokens."""
        before, count = self._tokens, states.shape[-2]
        self._tokens = self._plane.stored_tokens(count, self._sinks)
        if self._tokens > before:
            rows = states[..., self._sinks + before : self._sinks + self._tokens, :]
            x = rows.float()
            if before == 0:
                each = (self._plane.stored_tokens(tokens, self._sinks) for tokens in range(count - steps + 1, count + 1))
                self._scale = self._plane.layer_scale(x[..., : next(filter(None, each)), :])
            rows.copy_(self._plane.read_back(x, self._scale))
