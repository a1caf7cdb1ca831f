"""Every build of every kernel: for tests and for `elastickv doctor --compile-all`."""

import itertools
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from elastickv.backends.cuda.compiler import ARCHITECTURES, Compiled
from elastickv.backends.cuda.kernel_selection import (
    LARGEST_CLUSTER,
    MMA_SINCE,
    Split,
    Variant,
    blocks_variant,
    ceilings_variant,
    decode_variant,
    overlapping,
    split_variant,
)
from elastickv.recipe import DTYPES, HEAD_DIMS, Recipe
from elastickv.recipe.formats import value_groups


@dataclass(frozen=True)
class CompileRow:
    """One line of the table of `doctor --compile-all`."""

    kernel: str
    arch: str
    parameters: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    seconds: float


RECIPES = (
    "dense",
    "bf16",
    "bf16,stride=2",
    "bf16,reuse,anchor_every=4",
    "int8",
    "int8,stride=2",
    "int8,reuse,anchor_every=4",
    "int4",
    "int4,vgroup=V",
    "fp8",
    "k=int8,v=int4",
    "k=bf16,v=int4",
    "k=int8_per_channel,v=int8",
    "k=int8_per_channel,v=int4",
    "k=int8_per_channel,v=int8,pages=1/4",
    "int4,pages=1/4",
    "k=int4,v=int8,pages=1/4",
    "k=int4,v=bf16,pages=1/4",
)

ROTATED = ("int8", "int4")  # rows and pages: the storing kernels of these are also built with a rotation


def recipe_for(text: str, head_dim: int) -> Recipe:
    """Return a recipe of `RECIPES`; V stands for the smallest group of V channels that the head allows."""
    return Recipe.parse(text.replace("=V", f"={value_groups(head_dim)[0]}"))


def all_variants(architectures: Iterable[str] = ARCHITECTURES) -> Iterator[Variant]:
    """Yield every variant of every kernel, each once."""
    seen = set()
    for arch, head_dim, group, recipe in itertools.product(architectures, HEAD_DIMS, (1, 2, 4, 8, 16, 32), RECIPES):
        for dtype, kind in itertools.product(DTYPES, ("mma", "simt")):
            parsed = recipe_for(recipe, head_dim)
            rotated = [recipe_for(text, head_dim) for text in ROTATED]
            if kind == "mma" and (int(arch) < MMA_SINCE or parsed.exact_dtype(dtype) == "fp32"):
                continue
            variant = decode_variant(head_dim, group, dtype, parsed, arch, kind)
            split = [split_variant(variant, group, Split(n, n <= LARGEST_CLUSTER)) for n in (2, 4, 8, 16)]
            selecting = variant.selecting() if parsed.selection == "pages" else None
            paged = kind == "mma" and parsed.exact_dtype(dtype) == dtype and not parsed.is_dense
            paged = paged and parsed.selection in ("all", "pages")
            serving = blocks_variant(head_dim, group, dtype, parsed, arch) if paged else None
            for each in (
                variant,
                variant.fixed(),
                variant.storing(),
                variant.editing(),
                *((variant.storing("kv"), variant.editing("kv"), variant.rotating()) if parsed in rotated else ()),
                selecting,
                serving,
                serving and serving.storing_blocks(),
                serving and serving.selecting_blocks() if selecting else None,
                overlapping(variant),
                *split,
            ):
                if each and each not in seen:
                    seen.add(each)
                    yield each
        ceilings = ceilings_variant(arch)
        if ceilings not in seen:
            seen.add(ceilings)
            yield ceilings


def compile_all(architectures: Iterable[str] = ARCHITECTURES) -> Iterator[CompileRow]:
    """Compile every variant, on all processors, and yield the resources of each kernel."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for variant, compiled, seconds in pool.map(_timed, all_variants(architectures)):
            parameters = " ".join(f"{name}={value}" for name, value in variant.macros)
            for r in compiled.resources:
                name = f"{variant.source}:{r.kernel}"
                yield CompileRow(name, variant.arch, parameters, r.registers, r.spill_bytes, r.shared_bytes, seconds)
    finally:
        # Thousands may be queued: a caller that stops early must not wait for them.
        pool.shutdown(cancel_futures=True)


def _timed(variant: Variant) -> tuple[Variant, Compiled, float]:
    start = time.perf_counter()
    return variant, variant.compiled(), time.perf_counter() - start
