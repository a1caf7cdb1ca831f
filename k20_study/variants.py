"""Shared by the scripts of issue 20: builds of the page decode to compare."""
import os
from concurrent.futures import ThreadPoolExecutor

from elastickv.backends.cuda.kernel_selection import Variant, _pages_shared_bytes

# name -> macros added to the planned build; WARPS and STAGES set SHARED_BYTES too
VARIANTS = {
    "base": {"ELECT": 0},
    "elect": {},
    "few": {"FEW": 1},  # keys as rows of the product, queries' two parts as its columns: for at most 4 query heads
    "int": {"FEW": 1, "VINT": 1},  # and values by integer tensor cores, weights as four bytes
}
RINGS = {
    "int4": {"int_12x2": {"FEW": 1, "VINT": 1, "WARPS": 12, "STAGES": 2}, "elect_12x2": {"WARPS": 12, "STAGES": 2},
             "int_8x4": {"FEW": 1, "VINT": 1, "STAGES": 4}},
    "int8": {"int_10x2": {"FEW": 1, "VINT": 1, "WARPS": 10, "STAGES": 2}},
    "fp8": {"few_10x2": {"FEW": 1, "WARPS": 10, "STAGES": 2}},
}
ABLATED = {
    "base_loads": {"ELECT": 0, "ABLATE": 1},
    "elect_loads": {"ABLATE": 1},
    "base_math": {"ELECT": 0, "ABLATE": 2},
    "int_math": {"FEW": 1, "VINT": 1, "ABLATE": 2},
}


def built(planned: Variant, macros: dict[str, int]) -> Variant:
    all_ = dict(planned.macros) | macros
    if "WARPS" in macros or "STAGES" in macros:
        all_["SHARED_BYTES"] = _pages_shared_bytes(all_, all_["WARPS"], all_["TILES"], all_["STAGES"])
    return Variant(planned.source, planned.arch, tuple(sorted(all_.items())))


def use(cache, planned, fixed, macros) -> None:
    """Make `cache` decode with the planned kernel, built with more macros."""
    cache.variant = built(planned, macros)
    if fixed:
        cache._fixed = (built(fixed[0], macros), fixed[1])
    cache._choose()


def compile_all(jobs) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda v: v.compiled(), jobs))
