"""Refusals by who calls: another model, an attention that is not ours; a pass that broke off; a graph for training."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from elastickv.errors import UsageError
from elastickv.transformers.attention import EAGER_IMPLEMENTATION, IMPLEMENTATION, Pending
from elastickv.transformers.model_support import text_config
from elastickv.transformers.tensor_parallel import ranks_of

if TYPE_CHECKING:
    from elastickv.transformers.layer import ElasticLayer


NO_GRADIENT = "a cache in 8 or 4 bits has no gradient: run the model under torch.no_grad() or inference_mode()"


@dataclass
class Recording:
    """A pass in which layers queue a decode and count nothing.

    Attributes
    ----------
    queued : the layers that have queued theirs, in order.
    length_read : whether the model asked for the number of tokens: a replay would go on with this pass's.
    """

    queued: list[ElasticLayer] = field(default_factory=list)
    length_read: bool = False


class CacheChecks:
    """Watches that a cache's layers are asked by the model that they were made for."""

    def __init__(self, model: Any) -> None:
        self.model_name = type(model).__name__
        self._model = weakref.ref(model)
        self.config, self.ranks = text_config(model), ranks_of(model)
        self.device_map = getattr(model, "hf_device_map", None)
        self._modules: dict[int, weakref.ref[torch.nn.Module]] = {}
        self._waiting: Pending | None = None
        self.recording: Recording | None = None

    @property
    def model(self) -> Any:
        """The model, or None if it is gone."""
        return self._model()

    def copy(self) -> CacheChecks:
        """Return a guard for a copy of the cache."""
        other = object.__new__(CacheChecks)
        other.__dict__.update(self.__dict__)
        other._modules, other._waiting, other.recording = dict(self._modules), None, None
        return other

    def forget(self) -> None:
        """Expect nothing any more."""
        self._waiting = None

    @contextmanager
    def records(self, recording: Recording) -> Iterator[None]:
        """Let layers queue decodes and count nothing inside the block; one that breaks off leaves nothing expected."""
        self.recording = recording
        try:
            yield
        except BaseException:
            self._waiting = None
            raise
        finally:
            self.recording = None

    def note_length_read(self) -> None:
        """Note that the number of tokens was asked for."""
        if self.recording is not None:
            self.recording.length_read = True

    @property
    def attention_is_ours(self) -> bool:
        """Whether the model's attention is one that finds the layers."""
        return self.config._attn_implementation in (IMPLEMENTATION, EAGER_IMPLEMENTATION)

    def check_answered(self) -> None:
        """Raise UsageError if keys were given to a layer and its attention was never asked for."""
        if self._waiting is not None:
            raise UsageError(
                f"layer {self._waiting.layer.number} got keys and {IMPLEMENTATION!r} attention never asked for them: the model "
                f"is not the {self.model_name} that the cache was made for (make one with ElasticCache.for_model(model)), its "
                f"attention was set to another, or {self.model_name} alters keys on the way and is not supported; reset() "
                "the cache"
            )

    def expect(self, pending: Pending) -> None:
        """Note keys whose query will come.

        Raises
        ------
        UsageError : if the attention implementation is not ours, or the layer before was never asked for its attention, or a
            graph is being recorded.
        """
        self.check_answered()
        if torch.is_grad_enabled() and (pending.keys.requires_grad or pending.values.requires_grad):
            raise UsageError(NO_GRADIENT)
        if not self.attention_is_ours:
            present = self.config._attn_implementation
            raise UsageError(
                f"the attention of {self.model_name} is {present!r}, and an ElasticCache needs {IMPLEMENTATION!r}: "
                f"call model.set_attn_implementation({IMPLEMENTATION!r}), or generate inside `with ekv.elastic(model, ...)`"
            )
        self._waiting = pending

    def take(self, pending: Pending, module: torch.nn.Module) -> None:
        """Note that the query of `pending` came from `module`.

        Raises
        ------
        UsageError : if these keys were answered before, or the module is of another model.
        """
        number = pending.layer.number
        if pending is not self._waiting:
            raise UsageError(f"layer {number} is asked twice for the same keys: {self.model_name} is not supported")
        known = self._modules.get(number)
        if known is None:
            model = self._model()
            if model is not None and not any(module is other for other in model.modules()):
                raise UsageError(
                    f"the cache was made for another model ({self.model_name}) than the one that runs: make one for this model "
                    "with ElasticCache.for_model(model)"
                )
            self._modules[number] = weakref.ref(module)
        elif known() is not module:
            raise UsageError(
                f"the cache was filled by another model ({self.model_name}) than this one: make one for this model with "
                "ElasticCache.for_model(model)"
            )
        self._waiting = None

    def check_whole(self, layers: list[ElasticLayer]) -> None:
        """Raise UsageError if layers hold different numbers of tokens: a pass broke off on its way through them."""
        if len({layer.slots.length for layer in layers}) > 1:
            raise UsageError("a pass through the model broke off and its tokens are in some layers only: reset() the cache")
