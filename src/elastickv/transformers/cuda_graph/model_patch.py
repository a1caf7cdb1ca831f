"""What a model is given so that elastic caches work with it, and how it is taken back."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from elastickv.transformers.attention import EAGER_IMPLEMENTATION, IMPLEMENTATION, implementation_for
from elastickv.transformers.cache_argument import CACHE_ARGUMENT, cache_in, without_cache
from elastickv.transformers.cuda_graph.recorder import why_not

_OURS = (IMPLEMENTATION, EAGER_IMPLEMENTATION)
# By identity, beside the models: neither copies nor files of a model carry it.
_before: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class Forward:
    """The `forward` of one model instance: decodes with an elastic cache go through the cache, all else as before.

    It holds the model weakly, so that the model's memory is freed with its last reference. Copies and files of the model
    get one that is theirs.

    Parameters
    ----------
    own : the instance's `forward` before, where it had one of its own.
    """

    def __init__(self, model: Any, own: Callable[..., Any] | None) -> None:
        self._model, self.own = weakref.ref(model), own
        wrapped = own or type(model).forward
        functools.update_wrapper(self, wrapped)
        signature = inspect.signature(wrapped)
        parameters = list(signature.parameters.values())
        # `generate` asks which arguments there are.
        self.__signature__ = signature if own else signature.replace(parameters=parameters[1:])
        self._names = tuple(self.__signature__.parameters)
        self.takes_positions = "position_ids" in self._names or any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in parameters
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's outputs."""
        model: Any = self._model()
        forward = self.own or type(model).forward.__get__(model)
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        cache = cache_in(inputs)
        decode = getattr(cache, "captured_decode", None)
        if decode is None or len(args) > len(self._names) or torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        return decode(model, forward, without_cache(inputs) | {CACHE_ARGUMENT: cache}, self.takes_positions)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        """Return one for the copy of the model that is being made."""
        import copy

        model = self._model()
        return type(self)(memo.get(id(model), model), copy.deepcopy(self.own, memo))

    def __reduce__(self) -> Any:
        """Return what makes one for the model that a file holds."""
        return type(self), (self._model(), self.own)


def implementations(model: Any) -> Any:
    """Return the attention implementation of a model, for `set_attn_implementation`: a name, or one for each part."""
    parts = {
        name: getattr(model.config, name)._attn_implementation
        for name in model.config.sub_configs
        if getattr(model.config, name, None)
    }
    whole = model.config._attn_implementation
    return {"": whole, **parts} if parts else whole


def use_elastic_attention(model: Any) -> None:
    """Set a model's attention implementation to 'elastickv', or to 'elastickv_eager' if it was told to be 'eager'."""
    present = model.config._attn_implementation
    if present not in _OURS:
        _before[model] = implementations(model)
    model.set_attn_implementation(implementation_for(present))


def install(model: Any, capture: bool) -> None:
    """Let a model work with elastic caches, its decodes captured if that is asked for and can be; more than once is once."""
    use_elastic_attention(model)
    own = vars(model).get("forward")
    if why_not(model, capture) is None and not isinstance(own, Forward):
        model.forward = Forward(model, own)


@dataclass(frozen=True)
class ModelPatch:
    """What a model's attention and `forward` are at a time.

    Attributes
    ----------
    implementation : of its attention, for `set_attn_implementation`.
    forward : the instance's own, or None where it has its class's.
    """

    implementation: Any
    forward: Any


def patch_of(model: Any) -> ModelPatch:
    """Return what `restore` gives back."""
    return ModelPatch(implementations(model), vars(model).get("forward"))


def restore(model: Any, seam: ModelPatch) -> None:
    """Give a model the attention and the `forward` that it had, unless somebody has put another `forward` on top since."""
    present, wanted = vars(model).get("forward"), seam.forward
    known = present is None or isinstance(present, Forward) or present is getattr(wanted, "own", None)
    if known and present is not wanted:
        if wanted is None:
            del model.forward
        else:
            model.forward = wanted
    model.set_attn_implementation(seam.implementation)


def release(model: Any) -> None:
    """Take back what `ElasticCache.for_model` and `load` gave a model: its attention implementation and its `forward`.

    Caches made for the model need another `for_model` before they are of use again. A model that was given nothing is left
    as it is.
    """
    if model.config._attn_implementation in _OURS:
        usual = "sdpa" if model.config._attn_implementation == IMPLEMENTATION and model._supports_sdpa else "eager"
        implementation = _before.pop(model, usual)
    else:
        implementation = implementations(model)
    present = vars(model).get("forward")
    restore(model, ModelPatch(implementation, present.own if isinstance(present, Forward) else present))
