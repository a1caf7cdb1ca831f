"""Without a device: every kernel compiles for every architecture, almost nothing spills from SM 8.0 on, loads are wide."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest

from elastickv.backends import kernel_cache
from elastickv.backends.cuda import compiler
from elastickv.backends.cuda.builds import RECIPES, compile_all, recipe_for
from elastickv.backends.cuda.compiler import ARCHITECTURES
from elastickv.backends.cuda.kernel_selection import (
    Split,
    blocks_variant,
    ceilings_variant,
    decode_variant,
    overlapping,
    plan_splits,
    requires_pages,
    split_variant,
)
from elastickv.errors import CompileFailure
from elastickv.recipe import FORMATS, HEAD_DIMS, Recipe
from tests.helpers.full_disk import fill, small_disk

pytest.importorskip("cuda.bindings.nvrtc")
SUPPORTED = [a for a in ARCHITECTURES if int(a) in compiler.supported_architectures()]
GROUPS = (1, 2, 4, 8, 16, 32)
BY_ROW = [text for text in RECIPES if not requires_pages(recipe_for(text, 64))]


def each_source():
    """Every kernel source for every architecture once."""
    for arch in SUPPORTED:
        yield decode_variant(128, 4, "bf16", Recipe.parse("int8"), arch, "simt")
        yield decode_variant(128, 4, "bf16", Recipe.parse("int8"), arch, "simt").storing()
        yield ceilings_variant(arch)
        paged = Recipe.parse("int4,pages=1/4")
        yield decode_variant(128, 4, "bf16", paged, arch, "simt")
        yield decode_variant(128, 4, "bf16", paged, arch).storing()
        yield decode_variant(128, 4, "bf16", paged, arch).editing()
        yield decode_variant(128, 4, "bf16", paged, arch).rotating()
        if arch in ("61", "90"):
            yield decode_variant(128, 4, "bf16", paged, arch).storing("kv")
            yield decode_variant(80, 4, "bf16", paged, arch).editing("kv")
        yield decode_variant(128, 4, "bf16", paged, arch).selecting()
        per_channel = Recipe.parse("k=int8_per_channel,v=int8")
        yield decode_variant(128, 4, "bf16", per_channel, arch, "simt")
        if int(arch) >= 80:
            yield decode_variant(128, 4, "bf16", per_channel, arch).fixed()
            yield decode_variant(80, 4, "bf16", per_channel, arch).fixed()  # an odd number of products with the keys
            yield decode_variant(128, 4, "bf16", paged, arch)
            yield decode_variant(128, 4, "bf16", paged, arch).fixed()
            yield decode_variant(128, 8, "bf16", paged, arch).fixed()
            yield blocks_variant(128, 4, "bf16", Recipe.parse("int4"), arch)
            yield blocks_variant(128, 8, "bf16", Recipe.parse("int4"), arch)
            serving = blocks_variant(128, 4, "bf16", paged, arch)
            yield from (serving, serving.storing_blocks(), serving.selecting_blocks())
            general = decode_variant(128, 4, "bf16", Recipe.parse("int8"), arch, "mma")
            yield general
            yield split_variant(general, 4, Split(8, True))
            yield overlapping(general)


def parameters(kind):
    """Every combination of dtype, recipe, head_dim and group with a kernel of this kind; a stride needs no other kernel."""
    by_row = [text for text in BY_ROW if "stride" not in text]
    for dtype, text, dim, group in itertools.product(("fp32", "fp16", "bf16"), by_row, HEAD_DIMS, GROUPS):
        if kind == "simt" or Recipe.parse(text).exact_dtype(dtype) != "fp32":
            yield dtype, text, dim, group


def pairs(combination):
    return set(itertools.combinations(enumerate(combination), 2))


def covering(combinations):
    """A subset of `combinations` with every pair of values that occurs in any: greedily, the one with most new pairs first."""
    missing = set().union(*map(pairs, combinations))
    chosen = []
    while missing:
        best = max(combinations, key=lambda c: len(pairs(c) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def pairwise():
    """Every pair of dtype, recipe, head_dim and group in some variant of each kind, the architectures in turn."""
    others = {}
    for kind, oldest in (("simt", 0), ("mma", 80)):
        architectures = itertools.cycle([arch for arch in SUPPORTED if int(arch) >= oldest])
        for (dtype, text, dim, group), arch in zip(covering(list(parameters(kind))), architectures, strict=False):
            variant = decode_variant(dim, group, dtype, Recipe.parse(text), arch, kind)
            yield variant
            split = split_variant(variant, min(group, 8), Split(8, True) if group < 4 else Split(16))
            for other in filter(None, (variant.storing(), variant.editing(), split)):
                others.setdefault((other.source, other.macros), other)
    yield from others.values()


def paged():
    """On the oldest device and on SM 9.0: every recipe with pages, each with another head dimension and group."""
    sizes = zip(
        itertools.cycle(HEAD_DIMS), itertools.cycle(HEAD_DIMS[3:] + HEAD_DIMS[:3]), itertools.cycle(GROUPS), strict=False
    )
    for text, (dim, other, group) in zip((text for text in RECIPES if text not in BY_ROW), sizes, strict=False):
        if "61" in SUPPORTED:
            yield decode_variant(dim, group, "bf16", recipe_for(text, dim), "61")
        if "90" in SUPPORTED:
            yield decode_variant(dim, group, "fp16", recipe_for(text, dim), "90")
            yield (variant := decode_variant(dim, group, "fp16", recipe_for(text, dim), "90")).storing()
            yield variant.editing()
            yield decode_variant(other, group, "bf16", recipe_for(text, other), "90").fixed()
            yield (serving := blocks_variant(dim, group, "bf16", recipe_for(text, dim), "90"))
            yield blocks_variant(other, group, "bf16", recipe_for(text, other), "90").storing_blocks()
            if serving["SELECT"]:
                yield serving.selecting_blocks()


VARIANTS = sorted({*each_source(), *pairwise(), *paged()}, key=str)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """All variants, compiled side by side into a cache of their own."""
    folder = tmp_path_factory.mktemp("kernels")
    before = os.environ.get("ELASTICKV_CACHE_DIR")
    os.environ["ELASTICKV_CACHE_DIR"] = str(folder)
    try:
        with get_context("spawn").Pool(min(os.cpu_count() or 1, 8)) as pool:
            yield dict(zip(VARIANTS, pool.map(compile_variant, VARIANTS, chunksize=4), strict=True))
    finally:
        if before is None:
            del os.environ["ELASTICKV_CACHE_DIR"]
        else:
            os.environ["ELASTICKV_CACHE_DIR"] = before


def compile_variant(variant):
    return variant.compiled()


def test_nothing_spills_from_sm_80_on(compiled):
    def allowed(variant):
        # Large heads and a share of the work that is not known beforehand: more than 255 registers, at all of a block's size.
        # Of the kernels that read tables of blocks only the one with 8-bit codes and scales of channels needs so many.
        if variant.source not in ("decode_pages", "decode_blocks") or variant["FIXED"] or variant["HEAD_DIM"] <= 128:
            return 0
        per_channel = variant["K_FORMAT"] == FORMATS["int8_per_channel"].cuda_id
        return 128 if variant.source == "decode_pages" else 40 if per_channel and variant.arch == "90" else 0

    spilling = [
        (variant, r)
        for variant, c in compiled.items()
        for r in c.resources
        if int(variant.arch) >= 80 and r.spill_bytes > allowed(variant)
    ]
    assert not spilling, "\n".join(map(str, spilling))


def test_every_architecture_has_every_source(compiled):
    built = {(v.arch, v.source) for v in compiled}
    for arch in SUPPORTED:
        everywhere = ("decode_simt", "decode_pages_simt", "append", "edit", "rotate", "select", "ceilings")
        for source in (
            *everywhere,
            *(("decode_mma", "decode_split", "decode_pages") if int(arch) >= 80 else ()),
            *(("decode_blocks", "store_blocks", "select_blocks") if int(arch) >= 80 else ()),
        ):
            assert (arch, source) in built
    assert all(c.resources for c in compiled.values())


def disassembler():
    installed = shutil.which("nvdisasm")
    if installed:
        return installed
    for folder in sys.path:
        for path in Path(folder or ".").glob("nvidia/*/bin/nvdisasm*"):
            return str(path)
    pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")


def loop_code(cubin, tmp_path, kernel="decode"):
    """The SASS of a kernel."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(cubin)
    run = subprocess.run([disassembler(), "-c", str(file)], capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"this nvdisasm does not read the cubin: {run.stderr.strip().splitlines()[:1]}")
    section = run.stdout.partition(f".text.{kernel}:")[2]
    assert section
    return section.partition("\n.section")[0]


@pytest.mark.parametrize("arch", ["75", "80", "90", "120"])
@pytest.mark.parametrize("text", ["dense", "int8"])
def test_rows_are_read_16_bytes_at_a_time(arch, text, tmp_path):
    if arch not in SUPPORTED:
        pytest.skip(f"this NVRTC does not compile for {arch}")
    recipe = Recipe.parse(text)
    variants = {"simt": decode_variant(128, 4, "bf16", recipe, arch, "simt")}
    if int(arch) >= 80:
        variants["mma"] = decode_variant(128, 4, "bf16", recipe, arch, "mma")
        variants["split"] = split_variant(variants["mma"], 4, Split(8, True))
    for kind, variant in variants.items():
        code = loop_code(variant.compiled().cubin, tmp_path)
        wide = len(re.findall(r"\bLDG\.E[.\w]*\.128|\bLDGSTS[.\w]*\.128", code))
        # A unit has at least 4 wide loads of K and 4 of V; other global loads are scales, lengths, queries and the merge.
        assert wide >= 8, f"{kind}: {wide} wide loads"
        if text == "int8":
            assert re.search(r"\bIDP\.", code) if kind == "simt" else re.search(r"\bIMMA\.", code)
        if kind != "simt":
            assert re.search(r"\bHMMA\.16816\.F32", code)


def test_blocks_of_a_head_start_together_and_only_what_gains_is_split():
    heads, units = (1, 8, 16, 33, 66, 67, 500), (1, 64, 256, 100000)
    for batch, kv_heads, most, int8, multiprocessors in itertools.product((1, 3), heads, units, (False, True), (16, 132)):
        planned = plan_splits(batch, kv_heads, most, int8, multiprocessors)
        assert all(batch * kv_heads * split.blocks <= multiprocessors for split in planned)
        assert planned or most > 64 or 2 * batch * kv_heads > multiprocessors
        if batch > 1 or not int8:
            assert all(most <= 100 * split.blocks and split.cluster for split in planned)


@pytest.mark.parametrize(
    ("dim", "group", "text", "arch"),
    [(256, 1, "dense", "90"), (64, 9, "dense", "90"), (64, 1, "bf16,reuse,anchor_every=4", "90"), (64, 1, "dense", "75")],
)
def test_no_fixed_split_is_offered_where_there_is_no_kernel(dim, group, text, arch):
    assert split_variant(decode_variant(dim, group, "bf16", Recipe.parse(text), arch), group, Split(8)) is None


def test_dp4a_is_used_on_the_oldest_part(tmp_path):
    if "61" not in SUPPORTED:
        pytest.skip("this NVRTC starts at a newer part")
    ptx = ptx_of(decode_variant(128, 4, "bf16", Recipe.parse("int8"), "61"))
    assert "dp4a.s32.s32" in ptx and "ld.global.nc.v4" in ptx


def ptx_of(variant):
    """The PTX of a variant, for devices whose SASS current disassemblers no longer read."""
    from cuda.bindings import nvrtc

    source = (compiler.KERNELS / f"{variant.source}.cu").read_bytes()
    _, program = nvrtc.nvrtcCreateProgram(source, b"x.cu", 0, [], [])
    options = compiler._options(variant.arch, dict(variant.macros))
    options = [o.replace("=sm_", "=compute_") for o in options if "ptxas" not in o]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    assert int(status) == 0
    _, size = nvrtc.nvrtcGetPTXSize(program)
    text = b" " * size
    nvrtc.nvrtcGetPTX(program, text)
    return text.decode()


SMALL = ceilings_variant(SUPPORTED[-1], 2)


@pytest.fixture
def kernel_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ELASTICKV_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def test_a_compiled_kernel_is_cached(kernel_folder, monkeypatch):
    first = SMALL.compiled()
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled again"))
    assert SMALL.compiled() == first
    assert [p.suffix for p in kernel_folder.iterdir()] == [".kernel"]


@pytest.mark.gpu
def test_the_report_comes_with_every_compilation_though_there_is_a_driver(kernel_folder, open_cuda):
    open_cuda()
    first = SMALL.compiled()
    for path in kernel_folder.iterdir():
        path.unlink()
    assert SMALL.compiled() == first
    assert all(kernel.registers > 0 for kernel in first.resources)
    assert first.resources


@pytest.mark.fault("damaged kernel cache")
@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_file_is_compiled_again(kernel_folder, damage):
    first = SMALL.compiled()
    (path,) = kernel_folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-7] if damage is None else damage)
    assert SMALL.compiled() == first
    assert path.read_bytes() == whole


@pytest.mark.fault("read-only kernel cache")
def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("ELASTICKV_CACHE_DIR", str(blocked / "kernels"))
    monkeypatch.setattr(kernel_cache, "_warned", False)
    with pytest.warns(UserWarning, match="compiled kernels cannot be kept"):
        assert SMALL.compiled().cubin
    assert SMALL.compiled().cubin


@pytest.mark.fault("full kernel cache")
def test_a_full_folder_costs_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_cache, "_warned", False)
    with small_disk(tmp_path / "disk") as disk:
        if disk is None:
            pytest.skip("no file system may be mounted here")
        fill(disk)
        monkeypatch.setenv("ELASTICKV_CACHE_DIR", str(disk))
        with pytest.warns(UserWarning, match="No space left on device"):
            assert SMALL.compiled().cubin
        assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.fault("two processes compile at once")
def test_four_processes_may_compile_the_same(kernel_folder):
    with get_context("spawn").Pool(4) as pool:
        first, *others = pool.map(compile_variant, [SMALL] * 4, chunksize=1)
    assert others == [first] * 3
    assert [p.suffix for p in kernel_folder.iterdir()] == [".kernel"]


def test_the_table_names_kernel_and_resources(monkeypatch):
    monkeypatch.setattr("elastickv.backends.cuda.builds.all_variants", lambda _: iter([SMALL]))
    rows = list(compile_all())
    assert {r.kernel for r in rows} == {"ceilings:read", "ceilings:read_chunks", "ceilings:copy", "ceilings:multiply_add"}
    assert all(r.registers > 0 and r.spill_bytes == 0 and r.arch == SMALL.arch for r in rows)


@pytest.mark.fault("a kernel that does not compile")
def test_a_wrong_source_says_which_for_what_and_why_in_one_line(monkeypatch, tmp_path):
    (tmp_path / "broken.cu").write_text("int f() { return nothing; }" + "\nint g() { return nothing; }" * 200)
    monkeypatch.setattr(compiler, "KERNELS", tmp_path)
    monkeypatch.setenv("ELASTICKV_CACHE_DIR", str(tmp_path / "kernels"))
    arch = SUPPORTED[-1]
    with pytest.raises(CompileFailure, match=rf"broken\.cu \(SIDES=3\) does not compile for sm_{arch} .*nothing") as error:
        compiler.compile_source("broken", arch, {"SIDES": 3})
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert not (tmp_path / "kernels").exists()


@pytest.mark.parametrize("text", ["int4", "fp8", "k=int8,v=int4", "int4,pages=1/4"])
def test_pages_come_by_bulk_copies_and_go_to_the_tensor_cores(text, tmp_path):
    for arch, copies in (("80", r"\bLDGSTS[.\w]*\.128"), ("90", r"\bUBLKCP")):
        if arch not in SUPPORTED:
            pytest.skip(f"this NVRTC does not compile for {arch}")
        code = loop_code(decode_variant(128, 4, "bf16", Recipe.parse(text), arch).compiled().cubin, tmp_path)
        assert re.search(copies, code) and re.search(r"\bHMMA\.16816\.F32", code)
        if text.startswith("k=int8"):
            assert re.search(r"\bIMMA\.", code)


@pytest.mark.parametrize(("group", "as_rows"), [(1, 1), (4, 1), (5, 0), (8, 0), (16, 0)])
@pytest.mark.parametrize("text", ["int4", "fp8", "k=int8_per_channel,v=int8", "int4,pages=1/4"])
def test_keys_are_rows_of_the_products_with_at_most_four_query_heads(group, as_rows, text):
    for dim in HEAD_DIMS:
        planned = decode_variant(dim, group, "bf16", Recipe.parse(text), "90")
        variants = (planned, planned.fixed(), blocks_variant(dim, group, "bf16", Recipe.parse(text), "90"))
        assert [variant["KEYS_AS_ROWS"] for variant in variants] == [as_rows] * 3
        assert not as_rows or planned.passes(group) == 1


def test_keys_as_rows_halve_the_products_with_keys(tmp_path):
    if "90" not in SUPPORTED:
        pytest.skip("this NVRTC does not compile for 90")
    recipe, found = Recipe.parse("k=int8,v=fp8"), {}
    for group in (4, 8):
        code = loop_code(decode_variant(128, group, "bf16", recipe, "90").fixed().compiled().cubin, tmp_path)
        found[group] = len(re.findall(r"\bIMMA\.", code))
    assert found == {4: 8, 8: 16}


def test_an_elected_lane_starts_bulk_copies_without_loops_over_lanes(tmp_path):
    if "90" not in SUPPORTED:
        pytest.skip("this NVRTC does not compile for 90")
    code = loop_code(decode_variant(128, 4, "bf16", Recipe.parse("int4"), "90").fixed().compiled().cubin, tmp_path)
    assert len(re.findall(r"\bUBLKCP", code)) == 3, "one copy a page: before the loop, early in it, and at its end"
    assert "BRA.U.ANY" not in code[code.index("UBLKCP") : code.rindex("UBLKCP")]


@pytest.mark.parametrize("arch", ["80", "90", "120"])
def test_gathered_rows_are_read_and_written_16_bytes_at_a_time(arch, tmp_path):
    if arch not in SUPPORTED:
        pytest.skip(f"this NVRTC does not compile for {arch}")
    variant = blocks_variant(128, 4, "bf16", Recipe.parse("int4"), arch).storing_blocks()
    code = loop_code(variant.compiled().cubin, tmp_path, "gather_blocks").partition(".section")[0]
    stores = re.findall(r"\bSTG\.E[.\w]*", code)
    assert stores and all(".128" in each for each in stores)
    assert re.search(r"\bLDG\.E[.\w]*\.128", code)


def test_kernels_of_a_step_overlap_from_sm_90_on(tmp_path):
    if "90" not in SUPPORTED:
        pytest.skip("this NVRTC does not compile for 90")
    variant = decode_variant(128, 4, "bf16", Recipe.parse("int4,pages=1/4"), "90")
    for each, kernel in ((variant, "decode"), (variant.selecting(), "select"), (variant.storing(), "append")):
        code = loop_code(each.compiled().cubin, tmp_path, kernel)
        assert "ACQBULK" in code and "PREEXIT" in code  # griddepcontrol: wait, and let the next start
