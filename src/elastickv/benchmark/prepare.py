"""Before the clock runs: check memory, find the fastest dense variant, check that every contender computes attention."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from elastickv.backends import Backend
from elastickv.benchmark.accuracy import timed_kernel_error
from elastickv.benchmark.contenders import Contender, PeerWork, ours, plan_rotation, random_queries, ready_peers
from elastickv.benchmark.contenders.dense_choice import (
    FIRST_PAIRS,
    HOPELESS,
    USUAL_PAIRS,
    dtypes_to_try,
    in_turns,
    is_faster,
    why_baseline,
)
from elastickv.benchmark.options import Options
from elastickv.benchmark.result import DenseComparison
from elastickv.benchmark.sequential_decode import MEMORY_SHARE, choose_layers
from elastickv.benchmark.time_budget import TimeBudget
from elastickv.errors import DoesNotFit
from elastickv.kvcache.error_metrics import ErrorSummary
from elastickv.recipe import DENSE, Recipe, interval_bytes
from elastickv.recipe.formats import sixteen_bit

PREVIEW_SAMPLES = 3
# Of a time limit, what is over at the latest when the dense dtypes, a fallback and the peers are decided on.
DENSE_SHARE, FALLBACK_SHARE, PEERS_SHARE = 0.4, 0.5, 0.6


@dataclass(frozen=True)
class ContenderSet:
    """The contenders of a run.

    Attributes
    ----------
    baseline : the fastest dense contender; of equally fast ones that of the model's own dtype.
    baseline_reason : why it is the baseline.
    elastic : the recipe's contender.
    peers : every peer variant that runs, the baseline included if it is one.
    own_dense : our fastest dense contender.
    candidates_ms : preview of every dense contender, milliseconds per step. Peers with 8-bit keys and values are no baselines.
    compared : the paired comparisons that decided on the baseline, in their order.
    not_run : contenders that were not measured, and why.
    recipe, dtype : what the elastic contender runs, and the model's own dtype that it takes.
    fallback : why that is not the recipe that `auto` chose; None where it is.
    kernel_error : of our own contenders and of peers.
    """

    baseline: Contender
    baseline_reason: str
    elastic: Contender
    peers: list[Contender]
    own_dense: Contender
    recipe: Recipe
    dtype: str
    fallback: str | None
    candidates_ms: dict[str, float]
    compared: Sequence[DenseComparison]
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


def prepare(
    backend: Backend,
    options: Options,
    recipe: Recipe,
    query_rms: float,
    phase: Callable[[str], None],
    budget: TimeBudget | None = None,
) -> ContenderSet:
    """Allocate, check and compare every contender; retain the fastest dense one.

    Parameters
    ----------
    budget : dense dtypes and peers that do not fit into it are not measured, and `not_run` says why.

    Raises
    ------
    KernelMismatch : if one of our contenders is not within its kernel error.
    """
    return _Preparation(backend, options, query_rms, phase, budget or TimeBudget()).contenders(recipe)


class _Preparation:
    """Makes the contenders of one run."""

    def __init__(
        self, backend: Backend, options: Options, query_rms: float, phase: Callable[[str], None], budget: TimeBudget
    ) -> None:
        self._backend, self._options, self._query_rms = backend, options, query_rms
        self._phase, self._budget = phase, budget
        self._kernel_error: dict[str, ErrorSummary] = {}
        self._candidates: dict[str, float] = {}
        self._compared: list[DenseComparison] = []
        self._not_run: dict[str, str] = {}

    def contenders(self, recipe: Recipe) -> ContenderSet:
        """Return all of them."""
        options = self._options
        own_dense = self._fastest_dense()
        self._phase(f"preparing {recipe}")
        elastic, used, used_dtype = self._own("elastic", options.dtype, recipe), recipe, options.dtype
        fallback = None
        if options.recipe.strip() == "auto" and not recipe.is_dense:
            fallback = self._reason_to_fall_back(own_dense, elastic, recipe)
        if fallback is not None:
            # Where launches cost more than bytes, fewer bytes are no faster.
            elastic.close()
            used, used_dtype = DENSE, self._fallback_dtype(own_dense)
            elastic = self._own("elastic", used_dtype, used)
        peers = self._peers(own_dense) if options.peers else []
        baseline = self._fastest(own_dense, peers)
        unseen = [name for name in self._not_run if name.startswith("dense-")]
        return ContenderSet(
            baseline,
            why_baseline(baseline, options.dtype, self._compared, options.dense, unseen),
            elastic,
            peers,
            own_dense,
            used,
            used_dtype,
            fallback,
            self._candidates,
            self._compared,
            self._not_run,
            kernel_error=self._kernel_error,
        )

    def _own(self, name: str, dtype: str, recipe: Recipe) -> Contender:
        """Return one of our contenders, checked, after a sample."""
        backend, options = self._backend, self._options
        shape, context, seed = options.shape, options.seq, options.seed
        kv_bytes = interval_bytes(recipe, [context] * shape.batch, shape, dtype).kv
        # A third each for dense and elastic, one for the inference cycle and peers.
        limit = int(MEMORY_SHARE / 3 * backend.device.free_bytes // backend.cache_bytes(shape, context, dtype, recipe))
        rotation = plan_rotation(
            kv_bytes,
            options.inner_loops,
            recipe.anchor_every,
            backend.device.last_level_cache_bytes,
            options.cache == "cold",
            max(1, limit),
        )
        contender, program, caches = ours(
            name, backend, shape, context, dtype, recipe, rotation, seed, options.graphs, self._query_rms
        )
        contender.sample()
        contender.check()
        queries = random_queries(shape, seed, self._query_rms)
        self._kernel_error[name] = timed_kernel_error(caches[0], program.outputs()[0], queries)
        return contender

    def _fastest_dense(self) -> Contender:
        """Return our fastest dense contender: the model's own dtype unless another one is faster beyond its interval."""
        backend, options = self._backend, self._options
        best: Contender | None = None
        seconds = 0.0
        for dtype in dtypes_to_try(options.dtype, options.dense):
            name = f"dense-{dtype}"
            if not self._fits(dtype):
                self._not_run[name] = "does not fit together with the others"
                continue
            # fp32 has twice the bytes of the 16-bit dtypes; comparing takes about as long as preparing.
            shortage = None if best is None else self._budget.shortage(4 * seconds, DENSE_SHARE)
            if shortage is not None:
                self._not_run[name] = shortage
                continue
            self._phase(f"preparing {name}")
            start = time.monotonic()
            contender = self._own(name, dtype, DENSE)
            seconds = max(seconds, time.monotonic() - start)
            if best is None:
                best = contender
                continue
            faster = self._compare(best, contender, DENSE_SHARE)
            (best if faster else contender).close()
            best = contender if faster else best
        if best is not None and not self._candidates:
            self._candidates[best.name] = _preview(best)
        if best is None:
            raise DoesNotFit(f"`seq` {options.seq}: no dense cache fits {backend.device.name}; give a shorter context")
        return best

    def _fits(self, dtype: str) -> bool:
        backend, options = self._backend, self._options
        return backend.cache_bytes(options.shape, options.seq, dtype, DENSE) <= MEMORY_SHARE / 2 * backend.device.free_bytes

    def _compare(self, reference: Contender, other: Contender, share: float) -> bool:
        """Whether `other` is faster than `reference`, in turns."""
        comparison, self._candidates[reference.name], self._candidates[other.name] = self._in_turns(reference, other, share)
        self._compared.append(comparison)
        return is_faster(comparison)

    def _in_turns(self, reference: Contender, other: Contender, share: float) -> tuple[DenseComparison, float, float]:
        options = self._options
        return in_turns(reference, other, options.seed, min(options.reps, USUAL_PAIRS), self._budget.left_s(share))

    def _fallback_dtype(self, own_dense: Contender) -> str:
        """Return the dtype of a fallback: it never reads more than the dense 16-bit cache."""
        return own_dense.dtype if own_dense.dtype == sixteen_bit(own_dense.dtype) else sixteen_bit(self._options.dtype)

    def _reason_to_fall_back(self, own_dense: Contender, elastic: Contender, recipe: Recipe) -> str | None:
        """Return by how much a dense 16-bit cache is faster than the recipe, beyond the interval; None where it is not."""
        start = time.monotonic()
        elastic.sample()
        needed = 2 * FIRST_PAIRS * (time.monotonic() - start)
        if not self._budget.has_room("comparing the recipe with dense, which decides on a fallback", needed, FALLBACK_SHARE):
            return None
        dtype = self._fallback_dtype(own_dense)
        dense = own_dense
        if own_dense.dtype != dtype:
            if not self._fits(dtype):
                return None
            dense = self._own(f"dense-{dtype}", dtype, DENSE)
        comparison, slow, fast = self._in_turns(elastic, dense, FALLBACK_SHARE)
        if dense is not own_dense:
            dense.close()
        if not is_faster(comparison):
            return None
        ratio = comparison.speed
        return (
            f"auto fell back to dense-{dtype}: {recipe} took {1e3 * slow:.3g} us a step, dense-{dtype} {1e3 * fast:.3g} us, "
            f"{ratio.estimate:.3f}x [{ratio.low:.3f}, {ratio.high:.3f}] as fast"
        )

    def _peers(self, own_dense: Contender) -> list[Contender]:
        """Return the peers that run; note why the others do not."""
        options, backend = self._options, self._backend
        self._phase("preparing peers")
        shape, rotation = options.shape, own_dense.rotation
        work = PeerWork(
            backend.device, options.device or 0, shape, options.seq, rotation, options.seed, options.graphs, self._room_for_peer
        )
        peers, missing = ready_peers(work, str(options.peers))
        self._not_run |= missing
        self._kernel_error |= {peer.name: peer.error for peer in peers if peer.error is not None}
        return peers

    def _room_for_peer(self, seconds: float) -> str | None:
        return self._budget.shortage(seconds, PEERS_SHARE)

    def _fastest(self, own_dense: Contender, peers: Sequence[Contender]) -> Contender:
        """Return the baseline: our dense contender unless a dense peer is faster beyond the interval."""
        best = own_dense
        rivals = [peer for peer in peers if peer.is_dense]
        self._candidates |= {peer.name: _preview(peer) for peer in rivals}
        for peer in sorted(rivals, key=lambda peer: peer.dtype != self._options.dtype):
            close = self._candidates[peer.name] < HOPELESS * self._candidates[best.name]
            if close and self._compare(best, peer, PEERS_SHARE):
                best = peer
        return best


def _preview(contender: Contender) -> float:
    contender.sample()
    return median(contender.sample() for _ in range(PREVIEW_SAMPLES))
