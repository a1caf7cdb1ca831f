"""`with ekv.elastic(model, compress=4)`: every `generate` inside uses an elastic cache."""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from elastickv.errors import UsageError
from elastickv.transformers.cache import ElasticCache
from elastickv.transformers.cache_argument import CACHE_ARGUMENT, cache_in, without_cache
from elastickv.transformers.cache_report import CacheReport
from elastickv.transformers.cuda_graph.model_patch import Holder, end, hold, holders_here, uncompiled
from elastickv.transformers.generation_settings import check_elastic, check_supported, other_cache, resolved_settings


class Session:
    """What `elastic` returns.

    Attributes
    ----------
    cache : of the last `generate` inside, or None before the first.
    """

    def __init__(self) -> None:
        self.cache: ElasticCache | None = None

    def report(self) -> CacheReport | None:
        """Return the last cache's report, or None before the first `generate`."""
        return None if self.cache is None else self.cache.report()


class _Block:
    """An open block.

    Parameters
    ----------
    holder : what makes the model stay patched.
    session : of the block.
    empty : a cache that is never filled, which others are made from.
    """

    def __init__(self, holder: Holder, session: Session, empty: ElasticCache) -> None:
        self.holder, self.session, self._empty = holder, session, empty

    def new_cache(self) -> ElasticCache:
        """Return an empty cache with the block's options, for the `generate` that begins."""
        cache = self.session.cache = self._empty.another()
        return cache


# The open blocks of each model, the first of them opened first.
_open: weakref.WeakKeyDictionary[Any, list[_Block]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


class _Generate:
    """The `generate` of one model instance while blocks are open on it.

    Parameters
    ----------
    own : the instance's former `generate`, or None if it used its class's.
    """

    def __init__(self, model: Any, own: Callable[..., Any] | None) -> None:
        self._model, self.own = weakref.ref(model), own
        self._generate: Callable[..., Any] = own or model.generate
        self.__doc__, self.__signature__ = self._generate.__doc__, inspect.signature(self._generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with a new cache of the block that the call belongs to, unless the call asks for another cache or none."""
        model = self._model()
        with _lock:
            block = _block_of_call(model)
            holder = None if block is None else hold(model)
        if block is None or holder is None:
            return self._generate(*args, **kwargs)
        try:
            settings, cache = resolved_settings(model, args, kwargs), cache_in(kwargs)
            check_supported(settings)
            if isinstance(cache, ElasticCache):
                check_elastic(settings)
            if cache is not None:
                kwargs = without_cache(kwargs) | {CACHE_ARGUMENT: cache}
            elif other_cache(settings) is None and not settings.is_assistant:
                kwargs = without_cache(kwargs) | {CACHE_ARGUMENT: block.new_cache()}
            return self._generate(*args, **kwargs)
        finally:
            end(holder)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return the plain `generate` of the copy of the model that is being made."""
        model: Any = self._model()
        return copy.deepcopy(self.own, memo) or type(model).generate.__get__(memo.get(id(model), model))

    def __reduce__(self) -> Any:
        """Return what recreates the plain `generate` of a pickled model."""
        return getattr, (self._model(), "generate")


def _block_of_call(model: Any) -> _Block | None:
    """Return the last block that this thread or task has opened, or else the last one that is open. None if none is."""
    blocks, here = _open.get(model, []), holders_here(model)
    mine = [block for block in blocks if block.holder in here]
    return next(reversed(mine or blocks), None)


def _add(model: Any, block: _Block) -> None:
    """Open a block on a model that can generate."""
    if not callable(getattr(model, "generate", None)):
        raise UsageError(f"{type(model).__name__} has no generate: give a model that AutoModelForCausalLM returned")
    with _lock:
        _open.setdefault(model, []).append(block)
        # Only on the instance: other models of the class are not affected.
        own = vars(model).get("generate")
        if not isinstance(own, _Generate):
            model.generate = _Generate(model, own)


def _remove(model: Any, block: _Block) -> None:
    """Close a block, and with the last one restore the instance's `generate`; one that others have set since stays."""
    with _lock:
        blocks = _open[model]
        blocks.remove(block)
        if blocks:
            return
        del _open[model]
        present = vars(model).get("generate")
        if not isinstance(present, _Generate):
            return
        if present.own is None:
            del model.generate
        else:
            model.generate = present.own


@contextmanager
def elastic(model: Any, compress: float | None = None, **options: Any) -> Iterator[Session]:
    """Make every `model.generate` inside the block use a new `ElasticCache.for_model(model, compress, **options)`.

    Calls with their own cache, and calls whose settings ask for another cache or none, are not changed: `use_cache=False` or a
    `cache_implementation`, as an argument, in `generation_config` or in the model's own. Blocks may overlap, and end in any
    order and in any thread. A `generate` belongs to the last open block of its thread or task, or of the model if that has
    none. When the last block and the last `generate` inside have ended, also by an exception, the model's attention
    implementation, its `forward` and its `generate` are restored.

    Raises
    ------
    UsageError : as `ElasticCache.for_model`, or if the model cannot generate, before the block is entered.
    """
    model = uncompiled(model)
    holder = hold(model)
    try:
        block = _Block(holder, Session(), ElasticCache.for_model(model, compress, **options))
        _add(model, block)
        try:
            yield block.session
        finally:
            _remove(model, block)
    finally:
        end(holder)
