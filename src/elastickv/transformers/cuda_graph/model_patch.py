"""Patch a model so that elastic caches work with it, and undo the patch."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from elastickv.transformers.attention import EAGER_IMPLEMENTATION, IMPLEMENTATION, implementation_for
from elastickv.transformers.cache_argument import CACHE_ARGUMENT, cache_in, without_cache
from elastickv.transformers.cuda_graph.recorder import why_not

_OURS = (IMPLEMENTATION, EAGER_IMPLEMENTATION)
# Former implementations by identity of the model: copies and saved files of a model do not contain them.
_before: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
# Models that are patched for a time, and how to restore them.
_temporary: weakref.WeakKeyDictionary[Any, _TemporaryPatch] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


class Holder:
    """Something that needs a model patched for a time: a block, or a `generate` that runs in one.

    Parameters
    ----------
    model : the model; None once the holder has ended.
    """

    def __init__(self, model: Any) -> None:
        self.model = model


# The holders that began in the present thread or task.
_holders_here: ContextVar[tuple[Holder, ...]] = ContextVar("elastickv_holders", default=())


def holders_here(model: Any) -> tuple[Holder, ...]:
    """Return the holders of a model that began in this thread or task and have not ended, the last one last."""
    return tuple(holder for holder in _holders_here.get() if holder.model is model)


@dataclass
class _TemporaryPatch:
    """What a model returns to when the last of its holders ends.

    Attributes
    ----------
    after : the state to restore.
    holders : how many there are.
    """

    after: ModelPatch
    holders: int = 0


class Forward:
    """The `forward` of one model instance, which passes decodes with an elastic cache to the cache.

    It has a weak reference to the model, so that the model's memory is freed with its last strong reference. Copies and files
    of the model get their own.

    Parameters
    ----------
    own : the instance's former `forward`, or None if it used its class's.
    """

    def __init__(self, model: Any, own: Callable[..., Any] | None) -> None:
        self._model, self.own = weakref.ref(model), own
        wrapped = own or type(model).forward
        functools.update_wrapper(self, wrapped)
        signature = inspect.signature(wrapped)
        parameters = list(signature.parameters.values())
        # `generate` inspects the signature.
        self.__signature__ = signature if own else signature.replace(parameters=parameters[1:])
        self._names = tuple(self.__signature__.parameters)
        self.takes_positions = "position_ids" in self._names or any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in parameters
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's outputs."""
        model: Any = self._model()
        if torch.compiler.is_compiling():
            # Not a bound method: where a graph breaks, the compiler reads `model.forward`, which is this object.
            return self.own(*args, **kwargs) if self.own else type(model).forward(model, *args, **kwargs)
        forward = self.own or type(model).forward.__get__(model)
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        cache = cache_in(inputs)
        decode = getattr(cache, "captured_decode", None)
        if decode is None or len(args) > len(self._names):
            return forward(*args, **kwargs)
        return decode(model, forward, without_cache(inputs) | {CACHE_ARGUMENT: cache}, self.takes_positions)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        """Return a `Forward` for the copy of the model that is being made."""
        import copy

        model = self._model()
        return type(self)(memo.get(id(model), model), copy.deepcopy(self.own, memo))

    def __reduce__(self) -> Any:
        """Return what recreates this for a pickled model."""
        return type(self), (self._model(), self.own)


def implementations(model: Any) -> Any:
    """Return a model's attention implementation for `set_attn_implementation`: a name, or one for each sub-config."""
    parts = {
        name: getattr(model.config, name)._attn_implementation
        for name in model.config.sub_configs
        if getattr(model.config, name, None)
    }
    whole = model.config._attn_implementation
    return {"": whole, **parts} if parts else whole


def use_elastic_attention(model: Any) -> None:
    """Set a model's attention implementation to 'elastickv', or to 'elastickv_eager' if it was 'eager'."""
    present = model.config._attn_implementation
    if present not in _OURS:
        _before[model] = implementations(model)
    model.set_attn_implementation(implementation_for(present))


@dataclass(frozen=True)
class ModelPatch:
    """The attention implementation and `forward` of a model at one time.

    Attributes
    ----------
    implementation : of its attention, for `set_attn_implementation`.
    forward : the instance's own, or None where it uses its class's.
    """

    implementation: Any
    forward: Any


def patch_of(model: Any) -> ModelPatch:
    """Return the present state of a model, for `restore`."""
    return ModelPatch(implementations(model), vars(model).get("forward"))


def restore(model: Any, patch: ModelPatch) -> None:
    """Restore a model's attention implementation and `forward`; a `forward` that others have set since stays."""
    present, wanted = vars(model).get("forward"), patch.forward
    known = present is None or isinstance(present, Forward) or present is getattr(wanted, "own", None)
    if known and present is not wanted:
        if wanted is None:
            del model.forward
        else:
            model.forward = wanted
    model.set_attn_implementation(patch.implementation)


def install(model: Any, capture: bool) -> None:
    """Make a model work with elastic caches, and capture its decodes if `capture` and possible. Idempotent.

    The patch lasts until `release`, or inside a block until the block ends.
    """
    with _lock:
        use_elastic_attention(model)
        own = vars(model).get("forward")
        if why_not(model, capture) is None and not isinstance(own, Forward):
            model.forward = Forward(model, own)
        if model in _temporary and not holders_here(model):
            _temporary[model].after = patch_of(model)


def hold(model: Any) -> Holder:
    """Defer restoring a model: what `install` changes from now on stays until all holders have ended."""
    with _lock:
        patch = _temporary.setdefault(model, _TemporaryPatch(patch_of(model)))
        patch.holders += 1
    holder = Holder(model)
    _holders_here.set((*(other for other in _holders_here.get() if other.model is not None), holder))
    return holder


def end(holder: Holder) -> None:
    """End a holder, and with the last one restore its model. Holders may end in any order and in any thread."""
    model, holder.model = holder.model, None
    _holders_here.set(tuple(other for other in _holders_here.get() if other.model is not None))
    with _lock:
        patch = _temporary[model]
        patch.holders -= 1
        if not patch.holders:
            del _temporary[model]
            restore(model, patch.after)


def release(model: Any) -> None:
    """Undo what `ElasticCache.for_model` and `load` changed in a model: its attention implementation and its `forward`.

    Caches made for the model do not work until the next `for_model`. A model that was not changed stays as it is. Blocks that
    are open on the model continue to work, and the last one releases it.
    """
    model = uncompiled(model)
    with _lock:
        if model in _temporary:
            _temporary[model].after = _released(model, _temporary[model].after)
        else:
            restore(model, _released(model, patch_of(model)))


def _released(model: Any, patch: ModelPatch) -> ModelPatch:
    """Return a model's state without what `install` has changed."""
    implementation, forward = patch.implementation, patch.forward
    whole = implementation.get("") if isinstance(implementation, dict) else implementation
    if whole in _OURS:
        implementation = _before.pop(model, "sdpa" if whole == IMPLEMENTATION and model._supports_sdpa else "eager")
    return ModelPatch(implementation, forward.own if isinstance(forward, Forward) else forward)


def uncompiled(model: Any) -> Any:
    """Return the model inside what `torch.compile(model)` returned; another model itself."""
    return getattr(model, "_orig_mod", model)
