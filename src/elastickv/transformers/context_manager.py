"""`with ekv.elastic(model, compress=4)`: every `generate` inside uses an elastic cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from elastickv.transformers.cache import ElasticCache
from elastickv.transformers.cache_argument import CACHE_ARGUMENT, cache_in, without_cache
from elastickv.transformers.cache_report import CacheReport
from elastickv.transformers.cuda_graph.model_patch import patch_of, restore


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


@contextmanager
def elastic(model: Any, compress: float | None = None, **options: Any) -> Iterator[Session]:
    """Make every `model.generate` inside the block use a new `ElasticCache.for_model(model, compress, **options)`.

    Calls with their own cache, or with `use_cache=False`, are not changed. When the block ends, also by an exception, the
    model's attention implementation and its `forward` are restored.

    Raises
    ------
    UsageError : as `ElasticCache.for_model`, before the block is entered.
    """
    before = patch_of(model)
    shadowed = "generate" in vars(model)
    own = vars(model).get("generate")
    generate = model.generate
    first: list[ElasticCache] = [ElasticCache.for_model(model, compress, **options)]
    session = Session()

    def generate_elastic(*args: Any, **kwargs: Any) -> Any:
        cache = cache_in(kwargs)
        if cache is None and kwargs.get("use_cache") is not False:
            cache = session.cache = first.pop() if first else first_like(session)
        return generate(*args, **without_cache(kwargs) | {CACHE_ARGUMENT: cache})

    def first_like(session: Session) -> ElasticCache:
        assert session.cache is not None
        return session.cache.another()

    # Only on the instance: other models of the class are not affected.
    model.generate = generate_elastic
    try:
        yield session
    finally:
        if shadowed:
            model.generate = own
        else:
            del model.generate
        restore(model, before)
