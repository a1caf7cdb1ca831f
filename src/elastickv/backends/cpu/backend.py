"""The backend object: it creates caches and programs, checks that they fit, and measures limits."""

from collections.abc import Sequence

from elastickv.backends.compilation_report import current_report
from elastickv.backends.cpu import threads
from elastickv.backends.cpu.cache import CpuCache
from elastickv.backends.cpu.ceilings import Limits
from elastickv.backends.cpu.compilation import compile_kernels, needed_kernels
from elastickv.backends.cpu.device import describe
from elastickv.backends.cpu.layout import layout
from elastickv.backends.cpu.programs import AttentionProgram, CycleProgram
from elastickv.backends.feedback import Feedback
from elastickv.backends.protocol import Ceilings, DeviceInfo, Reporter
from elastickv.errors import UsageError
from elastickv.kvcache.gptq import LayerCompensation, check_compensation
from elastickv.kvcache.protocol import LayerCache
from elastickv.kvcache.tensor_view import Float32
from elastickv.recipe import DTYPES, AttentionShape, Recipe
from elastickv.recipe.shape import MAX_CONTEXT

GIB = 1 << 30


class CpuBackend:
    """The host's processor, through Numba's threads. The kernels of the first cache are compiled, which `report` shows."""

    name = "cpu"

    def __init__(self, report: Reporter | None = None) -> None:
        self._limits, self._report = Limits(), report

    @property
    def device(self) -> DeviceInfo:
        return describe()

    def follow(self, stream: int) -> None:
        """Do nothing: there are no streams."""

    def cache(
        self,
        shape: AttentionShape,
        capacity: int,
        dtype: str,
        recipe: Recipe,
        anchor_offset: int = 0,
        compensation: LayerCompensation | None = None,
    ) -> CpuCache:
        """Allocate the cache of one layer. Its anchors come `anchor_offset` steps early.

        Raises
        ------
        UsageError : if dtype, capacity or the recipe on this shape are not supported, it does not fit the free memory, or a
            compensation is needed and not there; before any allocation.
        CompileFailure : if a kernel does not compile.
        ValueError : if the offset is not 0 to recipe.anchor_every - 1.
        """
        if dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r} is unknown: choose {', '.join(DTYPES)}")
        if capacity < 1:
            raise UsageError(f"a capacity of {capacity} tokens holds nothing: give a whole number from 1 up")
        recipe.check_shape(shape.head_dim, shape.kv_heads)
        recipe.check_anchor_offset(anchor_offset)
        check_compensation(recipe, compensation)
        needed, free = self.cache_bytes(shape, capacity, dtype, recipe), self.device.free_bytes
        if needed > free:
            fits = self._fitting_context(shape, capacity, dtype, recipe, free)
            remedy = f"a context of {fits} tokens would fit" if fits else "no context fits: give a smaller batch or fewer heads"
            raise UsageError(
                f"a cache of {capacity} tokens ({recipe}) needs {needed} bytes ({needed / GIB:.1f} GiB); "
                f"{free} ({free / GIB:.1f} GiB) are free; {remedy}"
            )
        compile_kernels(needed_kernels(recipe, dtype), self._report or current_report())
        return CpuCache(shape, capacity, dtype, recipe, anchor_offset, compensation)

    def cache_bytes(self, shape: AttentionShape, capacity: int, dtype: str, recipe: Recipe) -> int:
        """Return the bytes that `cache` allocates: pages, scratch for each thread and partial result, and the marked copy."""
        return layout(shape, capacity, dtype, recipe, threads.count()).total_bytes

    def _fitting_context(self, shape: AttentionShape, capacity: int, dtype: str, recipe: Recipe, free: int) -> int:
        low, high = 0, min(capacity, MAX_CONTEXT)
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.cache_bytes(shape, middle, dtype, recipe) <= free
            low, high = (middle, high) if fits else (low, middle)
        return low

    def attention(self, caches: Sequence[LayerCache], queries: Sequence[Float32], steps: int, graph: bool) -> AttentionProgram:
        """Return a program of `steps` decodes over `caches` in turn; `graph` has no effect on this device."""
        return AttentionProgram(_own(caches), queries, steps)

    def cycle(self, caches: Sequence[LayerCache], first: Float32, feedback: Feedback, graph: bool) -> CycleProgram:
        """Return a program whose launch is one token through all `caches` as layers."""
        return CycleProgram(_own(caches), first, feedback)

    def ceilings(self) -> Ceilings:
        """Measure the read, copy and multiply-add limits (about a second)."""
        return self._limits.measure(self.device)


def _own(caches: Sequence[LayerCache]) -> list[CpuCache]:
    mine = [cache for cache in caches if isinstance(cache, CpuCache)]
    if not mine or len(mine) != len(caches):
        raise TypeError("the cpu backend runs its own caches, and at least one")
    return mine
