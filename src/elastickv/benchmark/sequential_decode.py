"""The inference cycle: decode steps that depend on each other, dense and elastic in mirrored order."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from elastickv.backends import Backend
from elastickv.backends.feedback import Feedback
from elastickv.benchmark.contenders import random_queries
from elastickv.benchmark.contenders.rotation import COLD_FACTOR
from elastickv.benchmark.sample_inputs import Sample
from elastickv.benchmark.sampler import Samples, collect
from elastickv.benchmark.stats.intervals import Interval, ratio_interval
from elastickv.errors import NonFiniteError, UsageError
from elastickv.kvcache import LayerCache
from elastickv.recipe import DENSE, AttentionShape, Recipe, interval_bytes

MAX_LAYERS = 64
MEMORY_SHARE = 0.85
ROUNDS = 6
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True)
class CycleSamples:
    """Latencies of every token of every round, milliseconds through all layers.

    Attributes
    ----------
    layers : distinct caches that a token passes through.
    latencies : contender -> (rounds, decode_tokens).
    phases : of each layer's elastic cache: their anchors are spread over the steps of an interval.
    speedup : ratio of the paired totals; None below two rounds.
    programs : contender -> (captured, graph nodes).
    complete : False after Ctrl-C.
    """

    layers: int
    phases: list[int]
    latencies: dict[str, np.ndarray]
    speedup: Interval | None
    programs: dict[str, tuple[bool, int | None]]
    complete: bool

    def total_ms(self, name: str) -> float:
        """Return the geometric mean of the rounds' totals through all layers: their ratio is the speed-up."""
        return float(np.exp(np.log(self.latencies[name].sum(axis=1)).mean()))

    def quantiles(self, name: str) -> dict[str, float]:
        """Return latency quantiles over all tokens of all rounds."""
        return {key: float(np.quantile(self.latencies[name], q)) for key, q in QUANTILES.items()}


class CycleTimeout(Exception):
    """One round of an inference cycle would not end in time, through however few layers."""


def choose_layers(
    backend: Backend, recipe: Recipe, shape: AttentionShape, context: int, capacity: int, dtype: str, layers: int | None
) -> int:
    """Return the layers of a cycle: `layers` if set, else enough that the elastic bytes exceed the last-level cache twice.

    Raises
    ------
    UsageError : if `layers` do not fit the device.
    """
    # The fastest dense dtype is not known yet: assume the widest.
    dense = backend.cache_bytes(shape, capacity, "fp32", DENSE)
    per_layer = backend.cache_bytes(shape, capacity, dtype, recipe) + dense
    fit = int(MEMORY_SHARE * backend.device.free_bytes // per_layer)
    if layers is None:
        kv = interval_bytes(recipe, [context] * shape.batch, shape, dtype).kv
        wanted = math.ceil(COLD_FACTOR * backend.device.last_level_cache_bytes / kv)
        layers = max(1, min(wanted, MAX_LAYERS, fit))
    if layers > fit:
        raise UsageError(
            f"an inference cycle of {layers} layers at {capacity} tokens needs {layers * per_layer / 2**30:.2f} GiB; "
            f"{MEMORY_SHARE * backend.device.free_bytes / 2**30:.2f} GiB can be used: {fit} layers fit"
        )
    return layers


def run_cycle(
    backend: Backend,
    recipe: Recipe,
    shape: AttentionShape,
    context: int,
    decode_tokens: int,
    dtype: str,
    dense_dtype: str,
    sample: Sample,
    *,
    layers: int,
    graph: bool,
    seed: int,
    time_limit_s: float | None,
    progress: Callable[[int, int], None],
    round_s: float = 0.0,
    grace_s: float = 0.0,
) -> CycleSamples:
    """Decode `decode_tokens` tokens from `context`, dense and elastic, in up to `ROUNDS` mirrored rounds.

    The last token of the context is decoded before the clock runs: that step is an anchor of all layers. From there on their
    anchors are spread, and every layer has one in each `anchor_every` tokens.

    Parameters
    ----------
    layers : how many at most; fewer where a round of all of them does not end in time.
    time_limit_s : seconds for all of it. Where only one round fits, the one that warms up is the result.
    round_s : about the seconds of a round of both, through all layers.
    grace_s : seconds by which the first round may exceed the time limit.

    Raises
    ------
    CycleTimeout : if not even a round through one layer ends by then.
    """
    began = time.monotonic()
    capacity, requested = context + decode_tokens, layers
    feedback = Feedback.seeded(shape.head_dim, seed, sample.query_rms, sample.key_rms, sample.value_rms)
    first = random_queries(shape, seed, 1.0)
    recipes = {"dense": (DENSE, dense_dtype), "elastic": (recipe, dtype)}
    caches: dict[str, list[LayerCache]] = {}
    layer = 0
    while layer < layers:
        for name, (used, used_dtype) in recipes.items():
            cache = backend.cache(shape, capacity, used_dtype, used, used.layer_anchor_offset(layer, layers))
            cache.fill_random(np.full(shape.batch, context - 1), seed + layer)
            rng = np.random.default_rng([seed, layer, 13])
            cache.append(*rng.standard_normal((2, shape.batch, shape.kv_heads, shape.head_dim), dtype=np.float32))
            cache.decode(first)
            cache.mark()
            caches.setdefault(name, []).append(cache)
        layer += 1
        if time_limit_s is not None:
            layer_s = (time.monotonic() - began) / layer + round_s / requested
            if layer_s > time_limit_s + grace_s:
                raise CycleTimeout(
                    f"a layer takes about {layer_s:.0f} s, and the time limit leaves {time_limit_s:.0f} s for all of them"
                )
            layers = min(layers, max(layer, int((time_limit_s + grace_s) / layer_s)))
    programs = {name: backend.cycle(caches[name], first, feedback, graph) for name in recipes}
    latencies: dict[str, list[list[float]]] = {name: [] for name in recipes}

    def one_round(name: str) -> float:
        programs[name].reset()
        times = programs[name].run(decode_tokens)
        if not all(np.isfinite(output).all() for output in programs[name].outputs()):
            raise NonFiniteError(f"the inference cycle of {name} left an output that is not finite")
        latencies[name].append(times)
        return sum(times)

    prepared = time.monotonic()
    warm = Samples({name: [one_round(name)] for name in recipes})
    now = time.monotonic()
    left = None if time_limit_s is None else time_limit_s - (now - began)
    if left is not None and 2 * (now - prepared) > left:
        samples = warm
    else:
        for rounds in latencies.values():
            rounds.clear()
        samples = collect(
            {name: (lambda name=name: one_round(name)) for name in recipes},  # type: ignore[misc]
            ROUNDS,
            paired=True,
            seed=seed,
            time_limit_s=left,
            progress=progress,
        )
    for name in recipes:
        for cache in caches[name]:
            cache.raise_non_finite()
    rounds_done = samples.rounds
    speedup = ratio_interval(samples.times["dense"], samples.times["elastic"], math.inf) if rounds_done >= 2 else None
    return CycleSamples(
        layers,
        [cache.anchor_offset for cache in caches["elastic"]],
        {name: np.array(rows[:rounds_done]) for name, rows in latencies.items()},
        speedup,
        {name: (program.captured, program.nodes) for name, program in programs.items()},
        samples.complete,
    )
