"""A backend on the NumPy reference: exact, slow, and with a clock that the test sets."""

import math
import sys
from dataclasses import replace
from itertools import count

import numpy as np

from elastickv.backends import Ceilings, DeviceInfo
from elastickv.benchmark import prepare, run
from elastickv.benchmark.accuracy import replay
from elastickv.kvcache import ReferenceCache
from elastickv.kvcache.error_metrics import ErrorSummary


class ReferenceProgram:
    """Runs the steps for real; its times are `milliseconds` of a made-up device."""

    captured, nodes, kernels_per_step = False, None, 1

    def __init__(self, caches, step, milliseconds):
        self._caches, self._step, self._milliseconds = caches, step, milliseconds
        self._outputs = [None] * len(caches)

    def run(self, launches=1):
        for _ in range(launches):
            self._step(self._outputs)
        return [next(self._milliseconds) for _ in range(launches)]

    def reset(self):
        for cache in self._caches:
            cache.rewind()

    def outputs(self):
        return self._outputs


class ReferenceBackend:
    """`seconds_per_byte` makes a step's time proportional to the KV bytes it reads, with seeded noise."""

    name = "reference"
    device = DeviceInfo("cpu", "Reference <CPU> [1]", None, 1, None, 1 << 16, 1 << 32, 1 << 31, None)

    def __init__(self, noise=0.01, seed=0):
        self._rng, self._noise = np.random.default_rng(seed), noise

    def cache(self, shape, capacity, dtype, recipe, anchor_offset=0, compensation=None):
        return ReferenceCache(shape, capacity, dtype, recipe, anchor_offset, compensation)

    def cache_bytes(self, shape, capacity, dtype, recipe):
        return shape.batch * shape.kv_heads * capacity * shape.head_dim * 8

    def _clock(self, bytes_per_launch):
        for _ in count():
            yield bytes_per_launch * 1e-7 * float(np.exp(self._rng.standard_normal() * self._noise))

    def attention(self, caches, queries, steps, graph):
        from elastickv.recipe import interval_bytes

        first = caches[0]
        moved = interval_bytes(first.recipe, first.lengths.tolist(), first.shape, first.dtype).kv

        def step(outputs):
            for i in range(min(steps, len(caches))):
                outputs[i] = caches[i].decode(queries[i])[0]

        return ReferenceProgram(caches, step, self._clock(moved * steps))

    def cycle(self, caches, first, feedback, graph):
        from elastickv.recipe import interval_bytes

        start = caches[0]
        moved = interval_bytes(start.recipe, start.lengths.tolist(), start.shape, start.dtype).kv
        state = {"x": first}

        def step(outputs):
            for i, cache in enumerate(caches):
                q, k, v = feedback(state["x"], cache.shape.group)
                cache.append(k, v)
                state["x"] = outputs[i] = cache.decode(q)[0].astype(np.float32)

        return ReferenceProgram(caches, step, self._clock(moved * len(caches)))

    def ceilings(self):
        return Ceilings(read_gbs=12.0, copy_gbs=10.0, flops=1e12)


def open_backend(device):
    """What `elastickv.backends.registry` calls."""
    return ReferenceBackend()


_CACHE, _ACCURACIES = ReferenceBackend.cache, {}


def replay_once(backend, sample, recipe, dtype, within_s=math.inf, progress=lambda done, total: None):
    """Return a sample's accuracy, computed once a process: float64 on the real sample takes most of a run here.

    With a patched backend it is computed again.
    """
    if type(backend) is not ReferenceBackend or type(backend).cache is not _CACHE:
        return replay(backend, sample, recipe, dtype, within_s, progress)
    key = (sample.name, str(recipe), dtype)
    if key not in _ACCURACIES:
        _ACCURACIES[key] = replay(backend, sample, recipe, dtype)
    return _ACCURACIES[key]


def measure_with(monkeypatch, backend):
    """Let `run` measure with this backend."""
    module = sys.modules[run.__module__]
    monkeypatch.setattr(module, "load", lambda name, device, report=None: (backend, None))
    monkeypatch.setattr(module, "replay", replay_once)


def measure_as_timed(monkeypatch):
    """Let `run` take the milliseconds in the returned dictionary for steps: of dense by its dtype, and of 'elastic'."""
    milliseconds = {"fp32": 1.0, "fp16": 1.0, "bf16": 1.0, "elastic": 1.0}
    measure_with(monkeypatch, ReferenceBackend())
    real = prepare.ours

    def timed(name, *args):
        contender, program, caches = real(name, *args)
        dtype, recipe = args[3], args[4]
        return replace(contender, sample=lambda: milliseconds[dtype if recipe.is_dense else "elastic"]), program, caches

    monkeypatch.setattr(prepare, "ours", timed)
    monkeypatch.setattr(prepare, "timed_kernel_error", lambda *_: ErrorSummary(0.0, 0.0, 0.0, 1))
    monkeypatch.setattr(ReferenceProgram, "outputs", lambda self: [np.zeros((1, 2, 64), np.float32)])
    return milliseconds
