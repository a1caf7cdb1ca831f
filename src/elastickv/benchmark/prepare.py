"""Before the clock runs: check memory, find the fastest dense variant, check that every contender computes attention."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from elastickv.backends import Backend
from elastickv.benchmark.accuracy import timed_kernel_error
from elastickv.benchmark.contenders import Contender, PeerWork, ours, plan_rotation, random_queries, ready_peers
from elastickv.benchmark.options import Options
from elastickv.benchmark.sequential_decode import MEMORY_SHARE, choose_layers
from elastickv.errors import DoesNotFit
from elastickv.kvcache.error_metrics import ErrorSummary
from elastickv.recipe import DENSE, DTYPES, Recipe, interval_bytes
from elastickv.recipe.formats import sixteen_bit

PREVIEW_SAMPLES = 3
CLOSE = 0.1  # of the logarithm of two times


@dataclass(frozen=True)
class ContenderSet:
    """The contenders of a run.

    Attributes
    ----------
    baseline : the fastest dense contender.
    elastic : the recipe's contender.
    peers : every peer variant that runs, the baseline included if it is one.
    own_dense : our fastest dense contender.
    candidates_ms : preview of every dense contender, milliseconds per step. Peers with 8-bit keys and values are no baselines.
    not_run : contenders that were not measured, and why.
    recipe, dtype : what the elastic contender runs, and the model's own dtype that it takes.
    fallback : why that is not the recipe that `auto` chose; None where it is.
    kernel_error : of our own contenders and of peers.
    """

    baseline: Contender
    elastic: Contender
    peers: list[Contender]
    own_dense: Contender
    recipe: Recipe
    dtype: str
    fallback: str | None
    candidates_ms: dict[str, float]
    not_run: dict[str, str]
    kernel_error: dict[str, ErrorSummary] = field(default_factory=dict)


def check_memory(backend: Backend, options: Options, recipe: Recipe) -> int:
    """Refuse, before anything is allocated, what the device cannot hold; return the layers of the inference cycle.

    Raises
    ------
    DoesNotFit : saying the bytes needed, the bytes free, and the context that would fit.
    """
    free = int(MEMORY_SHARE * backend.device.free_bytes)
    dense_dtype = sixteen_bit(options.dtype)

    def needed(context: int) -> int:
        dense = backend.cache_bytes(options.shape, context, dense_dtype, DENSE)
        elastic = backend.cache_bytes(options.shape, context, options.dtype, recipe) * recipe.anchor_every
        # The search for the fastest dense variant holds the best one so far and the next one.
        return dense + max(dense, elastic)

    if needed(options.seq) <= free:
        if not options.inference:
            return 0
        capacity = options.seq + options.decode_tokens
        return choose_layers(backend, recipe, options.shape, options.seq, capacity, options.dtype, options.layers)
    low, high = 0, options.seq
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= free else (low, middle)
    fits = f"a context of {low} would fit" if low else "no context fits: give fewer heads or sequences"
    raise DoesNotFit(
        f"`seq` {options.seq} needs {needed(options.seq) / 2**30:.2f} GiB for a dense and an elastic cache; "
        f"{free / 2**30:.2f} GiB of {backend.device.name} can be used; {fits}"
    )


def prepare(backend: Backend, options: Options, recipe: Recipe, query_rms: float, phase: Callable[[str], None]) -> ContenderSet:
    """Allocate, check and preview every contender; retain the fastest dense one.

    Raises
    ------
    KernelMismatch : if one of our contenders is not within its kernel error.
    """
    shape, context, seed = options.shape, options.seq, options.seed
    kernel_error: dict[str, ErrorSummary] = {}
    not_run: dict[str, str] = {}

    def own(name: str, dtype: str, own_recipe: Recipe) -> Contender:
        kv_bytes = interval_bytes(own_recipe, [context] * shape.batch, shape, dtype).kv
        # A third each for dense and elastic, one for the inference cycle and peers.
        limit = int(MEMORY_SHARE / 3 * backend.device.free_bytes // backend.cache_bytes(shape, context, dtype, own_recipe))
        rotation = plan_rotation(
            kv_bytes,
            options.inner_loops,
            own_recipe.anchor_every,
            backend.device.last_level_cache_bytes,
            options.cache == "cold",
            max(1, limit),
        )
        contender, program, caches = ours(
            name, backend, shape, context, dtype, own_recipe, rotation, seed, options.graphs, query_rms
        )
        contender.sample()
        contender.check()
        kernel_error[name] = timed_kernel_error(caches[0], program.outputs()[0], random_queries(shape, seed, query_rms))
        return contender

    best: tuple[float, Contender] | None = None
    candidates: dict[str, float] = {}
    for dtype in DTYPES if options.dense is None else (options.dense,):
        name = f"dense-{dtype}"
        if backend.cache_bytes(shape, context, dtype, DENSE) > MEMORY_SHARE / 2 * backend.device.free_bytes:
            not_run[name] = "does not fit together with the others"
            continue
        phase(f"preparing {name}")
        contender = own(name, dtype, DENSE)
        candidates[name] = _preview(contender)
        if best is not None and candidates[name] >= best[0]:
            contender.close()
            continue
        if best is not None:
            best[1].close()
        best = (candidates[name], contender)
    if best is None:
        raise DoesNotFit(f"`seq` {context}: no dense cache fits {backend.device.name}; give a shorter context")
    own_dense = best[1]
    phase(f"preparing {recipe}")
    elastic, used, used_dtype, fallback = own("elastic", options.dtype, recipe), recipe, options.dtype, None
    if options.recipe.strip() == "auto" and not recipe.is_dense:
        gain, taken = _paired_preview(own_dense, elastic)
        if gain < 1:
            # Where launches cost more than bytes, fewer bytes are no faster.
            elastic.close()
            used, used_dtype = DENSE, own_dense.dtype
            elastic = own("elastic", used_dtype, used)
            slow, fast = 1e3 * taken, 1e3 * taken * gain
            fallback = f"auto fell back to dense: {recipe} took {slow:.3g} us a step, {own_dense.name} {fast:.3g} us"
    peers: list[Contender] = []
    if options.peers:
        phase("preparing peers")
        work = PeerWork(backend.device, options.device or 0, shape, context, own_dense.rotation, seed, options.graphs)
        peers, missing = ready_peers(work, options.peers)
        not_run |= missing
        candidates |= {peer.name: _preview(peer) for peer in peers if peer.is_dense}
        kernel_error |= {peer.name: peer.error for peer in peers if peer.error is not None}
    rivals = {contender.name: contender for contender in [own_dense, *peers] if contender.is_dense}
    baseline = rivals[min(rivals, key=lambda name: candidates[name])]
    return ContenderSet(
        baseline, elastic, peers, own_dense, used, used_dtype, fallback, candidates, not_run, kernel_error=kernel_error
    )


def _preview(contender: Contender) -> float:
    contender.sample()
    return median(contender.sample() for _ in range(PREVIEW_SAMPLES))


def _paired_preview(dense: Contender, elastic: Contender) -> tuple[float, float]:
    """Return dense / elastic and the milliseconds of elastic, medians of alternating samples, more where they are close."""
    pairs = [(dense.sample(), elastic.sample()) for _ in range(PREVIEW_SAMPLES)]
    if abs(math.log(_ratio(pairs))) < CLOSE:
        pairs += [(dense.sample(), elastic.sample()) for _ in range(2 * PREVIEW_SAMPLES)]
    return _ratio(pairs), median(time for _, time in pairs)


def _ratio(pairs: list[tuple[float, float]]) -> float:
    return median(first / second for first, second in pairs)
