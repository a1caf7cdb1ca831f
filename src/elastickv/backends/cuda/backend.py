"""The CUDA backend: one device, its caches and programs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from elastickv.backends.cuda.cache import CudaCache
from elastickv.backends.cuda.ceilings import measure
from elastickv.backends.cuda.device import CudaDevice
from elastickv.backends.cuda.kernel_selection import (
    LARGEST_CLUSTER,
    Split,
    Variant,
    decode_variant,
    gains_from_pages,
    overlapping,
    plan_splits,
    split_variant,
    stored_recipe_for,
)
from elastickv.backends.cuda.programs import CudaProgram, attention_program, cycle_program
from elastickv.backends.cuda.storage import DeviceLayout, Scratch, ScratchSize
from elastickv.backends.feedback import Feedback
from elastickv.backends.protocol import Allocator, Ceilings, DeviceInfo
from elastickv.errors import UsageError
from elastickv.kvcache.gptq import LayerCompensation
from elastickv.kvcache.protocol import LayerCache
from elastickv.kvcache.tensor_view import Float32
from elastickv.recipe import PAGE_TOKENS, AttentionShape, Recipe
from elastickv.recipe.formats import round_up

_SPARE_BYTES = 128 << 20  # for contexts, kernels and staging


class CudaBackend:
    """Runs decode attention on one CUDA device.

    `kind` forces the 'mma' or the 'simt' kernels and `extra_macros` adds to a build, for tests and measurements. Memory comes
    from `allocator`; the default is the driver's. All caches share one scratch for partial results of decodes, so they must
    decode one after the other, on one stream.
    """

    name = "cuda"

    def __init__(
        self,
        device: int | None = None,
        kind: str = "auto",
        extra_macros: dict[str, int] | None = None,
        allocator: Allocator | None = None,
    ) -> None:
        self._device = CudaDevice(device, allocator)
        self._kind = kind
        self._extra = extra_macros or {}
        self._scratch: Scratch | None = None
        self._variants: dict[tuple[AttentionShape, int, str, Recipe], Variant] = {}

    @property
    def device(self) -> DeviceInfo:
        return self._device.info()

    def follow(self, stream: int) -> None:
        """Queue on the stream with this handle from now on."""
        self._device.follow(stream)

    def _stored_recipe(self, shape: AttentionShape, capacity: int, dtype: str, recipe: Recipe) -> Recipe:
        return stored_recipe_for(recipe, shape, capacity, dtype, self._device.arch) if self._kind == "auto" else recipe

    def _variant(self, shape: AttentionShape, capacity: int, dtype: str, recipe: Recipe) -> Variant:
        """Return the decode kernel; cached, because the layers of a model need the same one."""
        key = (shape, capacity, dtype, recipe)
        if key not in self._variants:
            self._variants[key] = self._chosen_variant(*key)
        return self._variants[key]

    def _chosen_variant(self, shape: AttentionShape, capacity: int, dtype: str, recipe: Recipe) -> Variant:
        recipe.check_shape(shape.head_dim, shape.kv_heads)
        stored_recipe = self._stored_recipe(shape, capacity, dtype, recipe)
        paged = stored_recipe is not recipe
        if self._kind == "auto" and not paged:
            paged = gains_from_pages(recipe, shape, self._device.arch, self._device.multiprocessors)
        kind = "pages" if paged else self._kind
        variant = decode_variant(shape.head_dim, shape.group, dtype, stored_recipe, self._device.arch, kind)
        if variant.paged:
            return Variant(variant.source, variant.arch, tuple(sorted((dict(variant.macros) | self._extra).items())))
        if "SPLITS" in self._extra:
            blocks = self._extra["SPLITS"]
            split = split_variant(variant, shape.group, Split(blocks, blocks <= LARGEST_CLUSTER)) if blocks else None
        else:
            split = self._planned_split(variant, shape, capacity, dtype, recipe)
        if split is None and shape.batch * shape.kv_heads > self._device.multiprocessors:
            variant = overlapping(variant)
        variant = split or variant
        macros = tuple(sorted((dict(variant.macros) | self._extra).items()))
        return Variant(variant.source, variant.arch, macros)

    def _planned_split(
        self, variant: Variant, shape: AttentionShape, capacity: int, dtype: str, recipe: Recipe
    ) -> Variant | None:
        """Return the kernel of the best fixed split whose clusters all run at once, if there is one."""
        units, int8 = DeviceLayout.of(shape, capacity, dtype, recipe).units(recipe), recipe.key_format == "int8"
        for planned in plan_splits(shape.batch, shape.kv_heads, units, int8, self._device.multiprocessors):
            split = split_variant(variant, shape.group, planned)
            if split and (not split["CLUSTER"] or self._clusters_at_once(split) >= shape.batch * shape.kv_heads):
                return split
        return None

    def _clusters_at_once(self, variant: Variant) -> int:
        return self._device.clusters_at_once(variant, "decode", variant.splits)

    def _grid(self, shape: AttentionShape, variant: Variant, layout: DeviceLayout) -> tuple[int, ScratchSize]:
        problems = shape.batch * shape.kv_heads * variant.passes(shape.group)
        blocks = problems * variant.splits
        if not blocks:
            blocks = self._device.multiprocessors * self._device.blocks_per_multiprocessor(variant, "decode")
        scores = layout.heads * round_up(layout.page_capacity, PAGE_TOKENS) if layout.lists else 0
        return blocks, ScratchSize.of(variant, blocks, problems, scores)

    def cache_bytes(self, shape: AttentionShape, capacity: int, dtype: str, recipe: Recipe) -> int:
        """Return the device bytes that `cache` would allocate, its scratch included."""
        variant = self._variant(shape, capacity, dtype, recipe)
        layout = DeviceLayout.of(shape, capacity, dtype, self._stored_recipe(shape, capacity, dtype, recipe), variant.paged)
        _, scratch = self._grid(shape, variant, layout)
        return layout.n_bytes + layout.marked_bytes + scratch.n_bytes

    def cache(
        self,
        shape: AttentionShape,
        capacity: int,
        dtype: str,
        recipe: Recipe,
        anchor_offset: int = 0,
        compensation: LayerCompensation | None = None,
    ) -> LayerCache:
        """Allocate the cache of one layer.

        Raises
        ------
        UsageError : if it does not fit the device, before any allocation; the message names a capacity that does.
        """
        if capacity < 1:
            raise UsageError(f"a capacity of {capacity} tokens holds nothing: give at least 1")
        stored_recipe = self._stored_recipe(shape, capacity, dtype, recipe)
        return self._made(
            shape, capacity, dtype, recipe, anchor_offset, stored_recipe, self._variant(shape, capacity, dtype, recipe)
        )

    def resized(self, cache: CudaCache, batch: int, capacity: int) -> CudaCache:
        """Return an empty cache for `batch` sequences of `capacity` tokens in the layout of `cache`.

        Raises
        ------
        UsageError : if it does not fit the device.
        """
        shape = replace(cache.shape, batch=batch)
        variant = self._variant(shape, capacity, cache.dtype, cache.recipe)
        if (variant.paged, self._stored_recipe(shape, capacity, cache.dtype, cache.recipe)) != (
            cache.variant.paged,
            cache.stored_recipe,
        ):
            variant = cache.variant
        return self._made(shape, capacity, cache.dtype, cache.recipe, cache.anchor_offset, cache.stored_recipe, variant)

    def _made(
        self,
        shape: AttentionShape,
        capacity: int,
        dtype: str,
        recipe: Recipe,
        anchor_offset: int,
        stored_recipe: Recipe,
        variant: Variant,
    ) -> CudaCache:
        layout = DeviceLayout.of(shape, capacity, dtype, stored_recipe, variant.paged)
        blocks, size = self._grid(shape, variant, layout)
        shared = self._scratch is not None and self._scratch.size.covers(size)
        needed = layout.n_bytes + layout.marked_bytes + (0 if shared else size.n_bytes)
        free = self._device.free_bytes - _SPARE_BYTES
        if needed > free:
            fits = self._largest_capacity(shape, capacity, dtype, stored_recipe, variant.paged, free - size.n_bytes)
            remedy = f"a context of {fits} tokens fits" if fits else "not even one token fits"
            raise UsageError(f"a cache of {capacity} tokens needs {needed} bytes, {max(free, 0)} are free: {remedy}")
        if not shared:
            self._scratch = Scratch(self._device, size)
        assert self._scratch is not None
        parts = (stored_recipe, variant, blocks, layout, self._scratch)
        return CudaCache(self._device, shape, capacity, dtype, recipe, anchor_offset, *parts, self.resized)

    @staticmethod
    def _largest_capacity(shape: AttentionShape, capacity: int, dtype: str, recipe: Recipe, paged: bool, free: int) -> int:
        low, high = 0, capacity
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (middle, high) if DeviceLayout.of(shape, middle, dtype, recipe, paged).n_bytes <= free else (low, middle)
            )
        return low

    def attention(self, caches: Sequence[LayerCache], queries: Sequence[Float32], steps: int, graph: bool) -> CudaProgram:
        """Return a program of `steps` decodes that cycle through `caches`, each with its own queries."""
        return attention_program(self._device, cast(Sequence[CudaCache], caches), queries, steps, graph)

    def cycle(self, caches: Sequence[LayerCache], first: Float32, feedback: Feedback, graph: bool) -> CudaProgram:
        """Return a program whose launch is one token through all `caches` as layers."""
        return cycle_program(self._device, cast(Sequence[CudaCache], caches), first, feedback, graph)

    def ceilings(self) -> Ceilings:
        """Measure the device's limits (about a second)."""
        return measure(self._device)
