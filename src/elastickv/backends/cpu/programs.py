"""Programs: a launch is one call into compiled code, for any number of steps."""

from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickv.backends.cpu import steps, threads
from elastickv.backends.cpu.cache import CpuCache, host_array
from elastickv.backends.feedback import Feedback
from elastickv.kvcache.tensor_view import Float32

Arrays = Sequence[NDArray[Any]]


def _addresses(arrays: Arrays) -> NDArray[np.int64]:
    return np.array([array.ctypes.data for array in arrays], np.int64)


class CpuProgram:
    """The common part of both programs. Outputs start as NaN, so that a missing step is noticed."""

    captured = False
    nodes: int | None = None
    kernels_per_step = 1

    def __init__(self, caches: Sequence[CpuCache]) -> None:
        self._caches = list(caches)
        shape = caches[0].shape
        self._threads = min(cache.threads_worth(int(cache.lengths.sum())) for cache in caches)
        self._outputs = [_unset(cache) for cache in caches]
        self._lse = np.empty((max(c.shape.batch * c.shape.query_heads for c in caches),), np.float32)
        self._descriptors = _addresses([cache.descriptor for cache in caches])
        self._output_table = _addresses(self._outputs)
        self._shape = shape
        for cache in caches:
            cache.mark()

    def reset(self) -> None:
        """Rewind the program's caches to their state when the program was made."""
        for cache in self._caches:
            cache.rewind()

    def outputs(self) -> list[Float32]:
        """Return, for each cache, the (batch, query_heads, head_dim) outputs of the last launch's last step on it."""
        return [output.copy() for output in self._outputs]


def _unset(cache: CpuCache) -> Float32:
    return np.full((cache.shape.batch, cache.shape.query_heads, cache.shape.head_dim), np.nan, np.float32)


def _timed(launch: Callable[[], None]) -> float:
    start = perf_counter_ns()
    launch()
    return (perf_counter_ns() - start) / 1e6


class AttentionProgram(CpuProgram):
    """`steps` decodes over the caches in turn."""

    def __init__(self, caches: Sequence[CpuCache], queries: Sequence[Float32], steps_: int) -> None:
        super().__init__(caches)
        if len(queries) != len(caches):
            raise ValueError(f"{len(queries)} query arrays for {len(caches)} caches: one for each is needed")
        shapes = [output.shape for output in self._outputs]
        self._queries = [host_array(q, shape, "queries").copy() for q, shape in zip(queries, shapes, strict=True)]
        self._counters = np.zeros(2 * steps_ * steps.TICKET_WORDS, np.int64)
        self._tables = [self._descriptors, _addresses(self._queries), self._output_table, _addresses([self._lse] * len(caches))]
        addresses = [table.ctypes.data for table in (self._counters, *self._tables)]
        self._parallel = threads.Launch(steps.attend, self._threads, [steps_, len(caches), *addresses])

    def run(self, launches: int = 1) -> list[float]:
        """Launch `launches` times in sequence and return the milliseconds of each."""
        for cache in self._caches:
            cache.check_anchor(cache.step)
        times = []
        for _ in range(launches):
            self._counters[:] = 0
            times.append(_timed(self._parallel))
        return times


class CycleProgram(CpuProgram):
    """One token through all caches as layers: map, append, decode, layer by layer."""

    def __init__(self, caches: Sequence[CpuCache], first: Float32, feedback: Feedback) -> None:
        super().__init__(caches)
        shape = self._shape
        if any(cache.shape != shape for cache in caches):
            raise ValueError("the layers of a cycle must have one shape")
        self._first = host_array(first, self._outputs[0].shape, "first")
        self._source = self._first.copy()
        query = np.empty_like(self._first)
        scratch = np.empty((shape.batch * shape.kv_heads, 3, shape.head_dim), np.float32)
        maps = (
            (feedback.query, feedback.query_rms),
            (feedback.key, feedback.key_rms),
            (feedback.value, feedback.value_rms),
        )
        self._maps: list[NDArray[Any]] = []
        for m, rms in maps:
            tables = (m.reflector, m.permutation.astype(np.int64), m.sign, np.full(1, rms, np.float32))
            self._maps += [np.ascontiguousarray(table) for table in tables]
        self._counters = np.zeros(3 * len(caches) * steps.TICKET_WORDS, np.int64)
        # Referenced here, because the compiled code holds only their addresses.
        self._arrays: list[NDArray[Any]] = [
            self._counters,
            self._source,
            query,
            self._lse,
            scratch,
            _addresses(self._maps),
            self._descriptors,
            self._output_table,
        ]
        self._parallel = threads.Launch(steps.one_token, self._threads, [len(caches), *_addresses(self._arrays).tolist()])

    def reset(self) -> None:
        """Rewind the caches, and feed the first layer with `first` again."""
        super().reset()
        self._source[:] = self._first

    def run(self, launches: int = 1) -> list[float]:
        """Launch `launches` times in sequence and return the milliseconds of each."""
        for cache in self._caches:
            cache.check_room(launches)
            cache.check_anchor(cache.step + 1)
        times = []
        for _ in range(launches):
            self._counters[:] = 0
            times.append(_timed(self._parallel))
            self._source[:] = self._outputs[-1]
        return times
