"""How many tokens to reserve memory for, and whether there is enough."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import replace

from elastickv.backends import Backend
from elastickv.errors import UsageError
from elastickv.recipe import AttentionShape, for_ratio
from elastickv.recipe.shape import MAX_CONTEXT
from elastickv.transformers.config import ElasticConfig
from elastickv.transformers.layer_storage import GIB
from elastickv.transformers.placement import Ranks

_ROUNDING = 64
_LEAST_SPARE = 256
_LEAST_RESERVE = 4096
_SPARE = 8
_TRIED = (2.0, 4.0, 8.0, 16.0, 32.0)


def first_capacity(config: ElasticConfig, longest: int, positions: int) -> int:
    """Return the tokens to reserve: the requested capacity, else what the running `generate` can reach, else an eighth more.

    Parameters
    ----------
    longest : tokens of the longest row.
    positions : of the prompt, padding included.
    """
    if config.capacity is not None:
        return config.capacity
    if config.expected is not None and config.expected >= positions:
        # A distant limit may never be reached: reserve a part, and grow later.
        needed = longest + min(config.expected - positions, max(_LEAST_RESERVE, longest))
    else:
        needed = longest + max(_LEAST_SPARE, longest // _SPARE)
    return min(-(-needed // _ROUNDING) * _ROUNDING, MAX_CONTEXT)


def check_memory(
    backend: Backend,
    config: ElasticConfig,
    ranks: Ranks,
    shape: AttentionShape,
    capacity: int,
    dtype: str,
    layers: Sequence[int],
) -> None:
    """Refuse, before the first of `layers` is stored, what they together have no memory for on their device.

    Raises
    ------
    UsageError : telling how much the context needs, and which ratio would fit.
    """
    assert config.budget is not None
    recipes = [ranks.share(config.budget.recipes[layer], config.sizes.kv_heads, shape.kv_heads) for layer in layers]
    needed = sum(backend.cache_bytes(shape, capacity, dtype, recipe) for recipe in recipes)
    free = backend.device.free_bytes
    if needed <= free:
        return
    one = replace(shape, batch=1)
    fitting = [
        ratio
        for ratio in _TRIED
        if len(recipes) * backend.cache_bytes(shape, capacity, dtype, for_ratio(ratio, MAX_CONTEXT, one, dtype)) <= free
    ]
    remedy = f"compress={fitting[0]:g} would fit" if fitting else "no compress would fit: give fewer tokens or sequences"
    raise UsageError(
        f"{shape.batch} sequences of {capacity} tokens need {needed / GIB:.2f} GiB in {len(recipes)} layers and "
        f"{free / GIB:.2f} GiB are free; {remedy}"
    )


def trim_heap() -> None:
    """Return memory that glibc retains after `free` to the system. Do nothing with other C libraries."""
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
