"""Our own contenders: caches on a backend, rotated past the last-level cache."""

import numpy as np

from elastickv.backends import Backend, Program
from elastickv.benchmark.contenders.base import Contender
from elastickv.benchmark.contenders.rotation import MAX_COPIES, Rotation
from elastickv.errors import NonFiniteError
from elastickv.kvcache import LayerCache
from elastickv.recipe import AttentionShape, Recipe, interval_bytes
from elastickv.version import __version__


def random_queries(shape: AttentionShape, seed: int, rms: float) -> np.ndarray:
    """Return seeded normal queries (batch, query_heads, head_dim) of a root mean square element."""
    rng = np.random.default_rng([seed, 7])
    drawn = rng.standard_normal((shape.batch, shape.query_heads, shape.head_dim), dtype=np.float32)
    return np.asarray(drawn * np.float32(rms))


def filled_caches(
    backend: Backend, shape: AttentionShape, context: int, dtype: str, recipe: Recipe, copies: int, seed: int
) -> list[LayerCache]:
    """Return caches at `context` tokens, copy i being i % anchor_every steps after an anchor."""
    caches = []
    rng = np.random.default_rng([seed, 11])
    query = random_queries(shape, seed, 1.0)
    for copy in range(copies):
        cache = backend.cache(shape, context, dtype, recipe)
        steps_since_refresh = min(copy % recipe.anchor_every, context - 1)
        before = context - steps_since_refresh - 1 if steps_since_refresh else context
        cache.fill_random(np.full(shape.batch, before), seed * MAX_COPIES + copy)
        if steps_since_refresh:
            for step in range(steps_since_refresh + 1):
                keys, values = rng.standard_normal((2, shape.batch, shape.kv_heads, shape.head_dim), dtype=np.float32)
                cache.append(keys, values)
                if step == 0:
                    cache.decode(query)
        caches.append(cache)
    return caches


def ours(
    name: str,
    backend: Backend,
    shape: AttentionShape,
    context: int,
    dtype: str,
    recipe: Recipe,
    rotation: Rotation,
    seed: int,
    graph: bool,
    query_rms: float = 1.0,
) -> tuple[Contender, Program, list[LayerCache]]:
    """Return a contender of our own, the program it times and the caches that it rotates through."""
    caches = filled_caches(backend, shape, context, dtype, recipe, rotation.copies, seed)
    query = random_queries(shape, seed, query_rms)
    program = backend.attention(caches, [query] * len(caches), rotation.steps, graph)
    held = [program]

    def check() -> None:
        if not all(np.isfinite(output).all() for output in held[0].outputs()):
            raise NonFiniteError(f"{name} left an output that is not finite: no figure is reported")

    contender = Contender(
        name,
        "dense" if recipe.is_dense else "elastic",
        __version__,
        dtype if recipe.is_dense else recipe.formats,
        interval_bytes(recipe, [context] * shape.batch, shape, dtype).kv,
        rotation,
        lambda: held[0].run(1)[0] / rotation.steps,
        program.captured,
        program.nodes,
        program.kernels_per_step,
        check,
        held.clear,
    )
    return contender, program, caches
