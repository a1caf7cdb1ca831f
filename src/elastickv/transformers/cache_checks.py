"""What a cache refuses: tensors and calls that it cannot serve, values that are not finite, another model's passes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elastickv.errors import NonFiniteError, UsageError
from elastickv.transformers.attention import EAGER_IMPLEMENTATION, IMPLEMENTATION, Call, Pending
from elastickv.transformers.cuda_graph.decode_protocol import Recording
from elastickv.transformers.generation_settings import NO_WEIGHTS
from elastickv.transformers.model_support import text_config
from elastickv.transformers.placement import ranks_of
from elastickv.transformers.torch_dtypes import dtype_name

NO_GRADIENT = "a cache in 8 or 4 bits has no gradient: run the model under torch.no_grad() or inference_mode()"
_UNSUPPORTED = ("sliding_window", "position_bias", "block_table")


class NotPicklable(UsageError, TypeError):
    """A cache, or a layer of one, was to be pickled."""

    def __init__(self) -> None:
        super().__init__(
            "an ElasticCache cannot be pickled (torch.save, multiprocessing): write it with cache.save(path), and read it with "
            "ElasticCache.load(path, model)"
        )


def check_tokens(
    keys: torch.Tensor, values: torch.Tensor, batch: int | None, stored: str | None, device: torch.device | None
) -> None:
    """Check that new tokens match the stored ones: kernels receive bare addresses.

    Parameters
    ----------
    keys, values : (batch, kv_heads, new, head_dim).
    batch : sequences in the cache; None while it is empty.
    stored : the model's dtype when the store was filled; None before that.
    device : where the stored tokens are; None while the cache is empty.

    Raises
    ------
    UsageError : if sizes, dtype or device differ.
    """
    if keys.shape != values.shape:
        raise UsageError(
            f"keys of shape {tuple(keys.shape)} and values of shape {tuple(values.shape)}: ElasticCache serves keys and values "
            "of one size"
        )
    if batch is not None and keys.shape[0] != batch:
        raise UsageError(
            f"the cache holds {batch} sequences and {keys.shape[0]} are given: reset() it, make another, or "
            "batch_repeat_interleave() or batch_select_indices() it"
        )
    if device is not None and keys.device != device:
        raise UsageError(
            f"the cache is on {device}, and keys on {keys.device} are given: reset() the cache, or move the model back"
        )
    if stored not in (None, "fp32", dtype_name(keys.dtype)):
        raise UsageError(
            f"the cache keeps {stored}, the model's dtype when it was filled, and keys of {keys.dtype} are given: reset() "
            "the cache, or convert the model back"
        )


def check_call(call: Call, model: str, layer: int) -> None:
    """Check that a cache can serve a call of the attention function.

    Raises
    ------
    UsageError : for gradients, dropout, windows and biases that are passed with the call, and attention to later tokens.
    """
    if torch.is_grad_enabled() and call.query.requires_grad:
        raise UsageError(NO_GRADIENT)
    if call.rest.get("dropout"):
        raise UsageError(f"{model} applies dropout to attention weights, which the cache does not support: call model.eval()")
    for word in _UNSUPPORTED:
        if call.rest.get(word) is not None:
            raise UsageError(f"{model}: layer {layer} attends with {word}, which is not supported")
    if getattr(call.module, "is_causal", True) is False or call.rest.get("is_causal") is False:
        raise UsageError(f"{model}: layer {layer} attends to later tokens, which a cache cannot hold")


def check_no_weights(call: Call) -> None:
    """Raise UsageError if attention weights are requested: a cache computes none for what it does not read."""
    of_model = getattr(getattr(call.module, "config", None), "output_attentions", False)
    if call.rest.get("output_attentions", of_model):
        raise UsageError(NO_WEIGHTS)


def check_finite(
    name: str, head_name: str, tensors: tuple[torch.Tensor, ...], real: NDArray[np.bool_] | None, before: NDArray[np.int64]
) -> None:
    """Check tokens for NaNs and infinities; padding is ignored.

    Parameters
    ----------
    name, head_name : what the tensors hold and what their heads are called, for the message.
    tensors : (batch, heads, positions, head_dim).
    real : (batch, positions), True for tokens; None: all are.
    before : (batch,) tokens before the first position.

    Raises
    ------
    NonFiniteError : naming sequence, head and position of the first value that is not finite.
    """
    finite = torch.stack([torch.isfinite(tensor).all(dim=-1) for tensor in tensors]).all(dim=0)
    if bool(finite.all()):
        return
    bad = ~finite.cpu().numpy()
    tokens = np.ones((bad.shape[0], bad.shape[2]), np.bool_) if real is None else real
    for row, head, index in np.argwhere(bad & tokens[:, None]):
        position = before[row] + tokens[row, :index].sum()
        raise NonFiniteError(f"{name} that is not finite: sequence {row}, {head_name} {head}, position {position}")


def check_same_length(lengths: Iterable[int]) -> None:
    """Raise UsageError if layers hold different numbers of tokens: a pass through the model stopped halfway."""
    if len(set(lengths)) > 1:
        raise UsageError("a pass through the model broke off and its tokens are in some layers only: reset() the cache")


class CacheChecks:
    """Checks that a cache's layers are called by the model that they were made for, keys first and then the query."""

    def __init__(self, model: Any) -> None:
        self.model_name = type(model).__name__
        self._model = weakref.ref(model)
        self.model_config, self.ranks = text_config(model), ranks_of(model)
        self.device_map = getattr(model, "hf_device_map", None)
        self._modules: dict[int, weakref.ref[torch.nn.Module]] = {}
        self._waiting: Pending | None = None
        self.recording: Recording | None = None

    @property
    def model(self) -> Any:
        """The model, or None if it was deleted."""
        return self._model()

    def copy(self) -> CacheChecks:
        """Return the checks for a copy of the cache."""
        other = object.__new__(CacheChecks)
        other.__dict__.update(self.__dict__)
        other._modules, other._waiting, other.recording = dict(self._modules), None, None
        return other

    def __copy__(self) -> CacheChecks:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheChecks:
        return self.copy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled, and with it every layer: it refers to the model."""
        raise NotPicklable

    def forget(self) -> None:
        """Stop expecting a query."""
        self._waiting = None

    @contextmanager
    def records(self, recording: Recording) -> Iterator[None]:
        """Let layers queue decodes without counting them inside the block; on an error no query is expected any more."""
        self.recording = recording
        try:
            yield
        except BaseException:
            self._waiting = None
            raise
        finally:
            self.recording = None

    def note_length_read(self) -> None:
        """Note that the number of tokens was read."""
        if self.recording is not None:
            self.recording.length_read = True

    @property
    def attention_is_ours(self) -> bool:
        """Whether the model's attention implementation is one that calls the layers."""
        return self.model_config._attn_implementation in (IMPLEMENTATION, EAGER_IMPLEMENTATION)

    def check_answered(self) -> None:
        """Raise UsageError if a layer received keys and its attention was never called."""
        if self._waiting is not None:
            number, name = self._waiting.layer.number, self.model_name
            raise UsageError(
                f"layer {number} received keys, and {IMPLEMENTATION!r} attention was never called with them: the model is not "
                f"the {name} that the cache was made for (make one with ElasticCache.for_model(model)), its attention "
                f"implementation was changed, or {name} alters keys before attention and is not supported; reset() the cache"
            )

    def expect(self, pending: Pending) -> None:
        """Expect the query of new keys.

        Raises
        ------
        UsageError : if the attention implementation is not ours, the previous layer's attention was never called, or a graph
            for gradients is being recorded.
        """
        self.check_answered()
        if torch.is_grad_enabled() and (pending.keys.requires_grad or pending.values.requires_grad):
            raise UsageError(NO_GRADIENT)
        if not self.attention_is_ours:
            present = self.model_config._attn_implementation
            raise UsageError(
                f"the attention of {self.model_name} is {present!r}, and an ElasticCache needs {IMPLEMENTATION!r}: "
                f"call model.set_attn_implementation({IMPLEMENTATION!r}), or generate inside `with ekv.elastic(model, ...)`"
            )
        self._waiting = pending

    def take(self, pending: Pending, module: torch.nn.Module) -> None:
        """Note that the query of `pending` came from `module`.

        Raises
        ------
        UsageError : if these keys were answered before, or the module belongs to another model.
        """
        number = pending.layer.number
        if pending is not self._waiting:
            raise UsageError(f"layer {number} attends twice with the same keys: {self.model_name} is not supported")
        known = self._modules.get(number)
        if known is None:
            model = self._model()
            if model is not None and not any(module is other for other in model.modules()):
                raise UsageError(
                    f"the cache was made for another model ({self.model_name}) than the running one: make one for this model "
                    "with ElasticCache.for_model(model)"
                )
            self._modules[number] = weakref.ref(module)
        elif known() is not module:
            raise UsageError(
                f"the cache was filled by another model ({self.model_name}) than this one: make one for this model with "
                "ElasticCache.for_model(model)"
            )
        self._waiting = None
