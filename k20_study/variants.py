"""Shared by the scripts of issue 20: builds of the page decode to compare."""

import os
from concurrent.futures import ThreadPoolExecutor

from elastickv.backends.cuda.format_macros import format_of
from elastickv.backends.cuda.kernel_selection import Variant, _pages_shared_bytes
from elastickv.recipe.formats import round_up

# name -> macros added to the planned build; WARPS and STAGES set SHARED_BYTES too
VARIANTS = {
    "base": {"ELECT": 0},
    "elect": {},
    "few": {"FEW": 1},  # keys as rows of the product, queries' two parts as its columns: for at most 4 query heads
    "int": {"FEW": 1, "VINT": 1},  # and values by integer tensor cores, weights as four bytes
}
INT = {"FEW": 1, "VINT": 1}
TWO = INT | {"TWO_PAGES": 1}  # two adjacent pages a stage and a turn; only with equally many blocks a head, without selection
RINGS = {
    "int4": {
        "two_8x2": TWO | {"STAGES": 2},
        "fewtwo_8x2": {"FEW": 1, "TWO_PAGES": 1, "STAGES": 2},
        "int_12x2": INT | {"WARPS": 12, "STAGES": 2},
        "int_8x4": INT | {"STAGES": 4},
    },
    "int8": {"two_6x2": TWO | {"WARPS": 6, "STAGES": 2}, "int_10x2": INT | {"WARPS": 10, "STAGES": 2}},
    "fp8": {"few_10x2": {"FEW": 1, "WARPS": 10, "STAGES": 2}},
}
ABLATED = {
    "base_loads": {"ELECT": 0, "ABLATE": 1},
    "elect_loads": {"ABLATE": 1},
    "base_math": {"ELECT": 0, "ABLATE": 2},
    "int_math": {"FEW": 1, "VINT": 1, "ABLATE": 2},
}
TIMED_ONLY = {
    "int4": {"two_loads": TWO | {"STAGES": 2, "ABLATE": 1}, "two_math": TWO | {"STAGES": 2, "ABLATE": 2}},
    "int8": {"two_loads": TWO | {"WARPS": 6, "STAGES": 2, "ABLATE": 1}},
}


def shared_bytes(macros, pages):
    """sizeof(Shared) with stages of `pages` pages."""
    dim, warps, stages = macros["HEAD_DIM"], macros["WARPS"], macros["STAGES"]
    key, value = format_of(macros["K_FORMAT"]), format_of(macros["V_FORMAT"])
    scales = (key.key_scales(dim).bytes_of(32), value.value_scales(dim, macros["V_GROUP"]).bytes_of(32))
    one = round_up(32 * (key.key_row_bytes(dim) + value.row_bytes(dim)) + sum(round_up(n, 16) for n in scales), 128)
    many = round_up(
        pages * 32 * (key.key_row_bytes(dim) + value.row_bytes(dim)) + sum(round_up(pages * n, 16) for n in scales), 128
    )
    return _pages_shared_bytes(macros, warps, macros["TILES"], stages) + warps * stages * (many - one)


def built(planned: Variant, macros: dict[str, int]) -> Variant:
    all_ = dict(planned.macros) | macros
    if "WARPS" in macros or "STAGES" in macros:
        pages = 2 if macros.get("TWO_PAGES") else 1
        all_["SHARED_BYTES"] = shared_bytes(all_, pages)
    return Variant(planned.source, planned.arch, tuple(sorted(all_.items())))


def use(cache, planned, fixed, macros) -> None:
    """Make `cache` decode with the planned kernel, built with more macros."""
    cache.variant = planned if "TWO_PAGES" in macros else built(planned, macros)
    if fixed:
        cache._fixed = (built(fixed[0], macros), fixed[1])
    cache._choose()


def compile_all(jobs) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda v: v.compiled(), jobs))
