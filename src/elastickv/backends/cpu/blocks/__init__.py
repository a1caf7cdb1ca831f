"""Decode and store in the blocks of a serving engine, which owns the memory and the tables."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elastickv.backends.cpu.blocks.block_kernels import NumbaBlockKernels
    from elastickv.recipe import AttentionShape, Recipe

__all__ = ["open_block_kernels"]


def open_block_kernels(shape: "AttentionShape", dtype: str, recipe: "Recipe", exact_tokens: int) -> "NumbaBlockKernels":
    """Return the kernels for one shape, dtype and pair of formats; see `NumbaBlockKernels`.

    Raises
    ------
    UsageError : if no kernel supports the combination, or Numba cannot run with its environment variables.
    CompileFailure : if a kernel does not compile.
    """
    from elastickv.backends.cpu.blocks.openmp import loaded_openmp
    from elastickv.backends.cpu.settings import check_settings

    check_settings(start_threads=loaded_openmp() is None)
    from elastickv.backends.cpu.numba_cache import cache_kernels_on_disk

    with cache_kernels_on_disk():
        from elastickv.backends.cpu.blocks.block_kernels import NumbaBlockKernels
    return NumbaBlockKernels(shape, dtype, recipe, exact_tokens)
