"""One backend for all tests of this folder: compiling it once is most of their time."""

from collections.abc import Callable

import numpy as np
import pytest

from elastickv.backends import Backend
from elastickv.backends.cpu import open_backend
from elastickv.kvcache import LayerCache, Oracle
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.kvcache.tensor_view import Float32


@pytest.fixture(scope="session")
def backend() -> Backend:
    return open_backend(None)


class Driver:
    """Feeds caches with seeded tokens and compares their decodes with the float64 reference."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def tokens(self, cache: LayerCache, tokens: int) -> tuple[Float32, Float32]:
        shape = cache.shape
        keys, values = self.rng.standard_normal((2, shape.batch, shape.kv_heads, tokens, shape.head_dim), dtype=np.float32)
        return keys, values

    def queries(self, cache: LayerCache) -> Float32:
        shape = cache.shape
        return 2 * self.rng.standard_normal((shape.batch, shape.query_heads, shape.head_dim), dtype=np.float32)

    def append(self, cache: LayerCache) -> None:
        keys, values = self.tokens(cache, 1)
        cache.append(keys[:, :, 0], values[:, :, 0])

    def error(self, cache: LayerCache, oracle: Oracle) -> float:
        """Decode once with both and return the larger of the output's relative and the log-sum-exp's absolute error."""
        queries = self.queries(cache)
        output, lse = cache.decode(queries)
        expected, expected_lse = oracle.decode(queries)
        return max(relative_l2(output, expected).max(), np.abs(lse - expected_lse).max())


@pytest.fixture(scope="session")
def new_driver() -> Callable[[int], Driver]:
    return Driver


@pytest.fixture
def driver() -> Driver:
    return Driver()
