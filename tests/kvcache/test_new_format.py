"""A KV format is a row of `FORMATS` and a codec: recipes, byte counts, the reference cache and the oracle need no more."""

import ast
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

import elastickv
from elastickv.backends.cpu import open_backend
from elastickv.backends.cuda.format_macros import format_macros
from elastickv.backends.cuda.kernel_selection import blocks_variant, decode_variant
from elastickv.errors import UsageError
from elastickv.kvcache import Oracle, ReferenceCache
from elastickv.kvcache.attention import attend
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.kvcache.quantize import CODECS, Codec, dequantize_int8
from elastickv.kvcache.rounding import from_bf16_bits, to_bf16_bits
from elastickv.recipe import AttentionShape, Recipe, predicted_loss, step_bytes, stored_bytes
from elastickv.recipe.formats import FORMATS, Format, ScaleLayout, cold_formats, unread_formats

SOURCE = Path(elastickv.__file__).parent
SHAPE = AttentionShape(2, 6, 2, 64)
LENGTHS = np.array([700, 421])


def quantize_int6(rows):
    peak = np.abs(rows).max(axis=-1)
    scales = to_bf16_bits(np.where(peak > 0, peak / np.float32(31), 1))
    return np.clip(np.rint(rows / from_bf16_bits(scales)[..., None]), -31, 31).astype(np.int8), scales


@pytest.fixture
def int6(monkeypatch):
    layout = ScaleLayout.TOKEN
    monkeypatch.setitem(FORMATS, "int6", Format("int6", 6, layout, layout, signed=True, largest_code=31))
    monkeypatch.setitem(CODECS, "int6", Codec.of_both(quantize_int6, dequantize_int8))


def test_recipes_name_it(int6):
    for text in ("int6", "k=int6,v=int4,vgroup=32", "k=int4,v=int6,pages=1/4", "int6,stride=4"):
        assert str(Recipe.parse(text)) == text
    assert cold_formats()[-1] == "int6"
    with pytest.raises(UsageError, match="formats are bf16, fp16, fp8, int8, int4, int8_per_channel, int3, int2, int6"):
        Recipe(key_format="int5")
    with pytest.raises(UsageError, match="'pages' does not combine with keys in int6"):
        Recipe.parse("int6,pages=1/4")


def test_its_bytes_are_counted(int6):
    one = AttentionShape(1, 1, 1, 64)
    cold = 700 - 4 - 128 - (700 - 4 - 128) % 32
    step = step_bytes(Recipe.parse("int6"), [700], one)
    assert step.codes == 2 * cold * 48 and step.scales == 2 * cold * 2
    assert stored_bytes(Recipe.parse("int4"), [700], one) < stored_bytes(Recipe.parse("int6"), [700], one)
    assert stored_bytes(Recipe.parse("int6"), [700], one) < stored_bytes(Recipe.parse("int8"), [700], one)
    assert predicted_loss(Recipe.parse("int6"), 64) is None


def test_the_reference_cache_and_the_oracle_store_and_read_it(int6):
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 2, SHAPE.kv_heads, 700, SHAPE.head_dim), dtype=np.float32)
    queries = rng.standard_normal((2, 6, 64), dtype=np.float32)
    exact = attend(queries[0, :3], keys[0, 0], values[0, 0]).output
    errors = []
    for text in ("int8", "int6", "int4"):
        cache = ReferenceCache(SHAPE, 800, "bf16", Recipe.parse(text))
        cache.prefill(keys, values, LENGTHS)
        outputs, _ = cache.decode(queries)
        np.testing.assert_array_equal(outputs, Oracle(cache).decode(queries)[0])
        errors.append(relative_l2(outputs[0, :3], exact).max())
    assert errors[0] < errors[1] < errors[2]
    cache = ReferenceCache(SHAPE, 800, "bf16", Recipe.parse("int6"))
    cache.prefill(keys, values, LENGTHS)
    cold = cache.stored(0, 1).cold_keys
    np.testing.assert_array_equal(cold, dequantize_int8(*quantize_int6(cache._keys[0, 1, 4 : 4 + len(cold)])))


def test_back_ends_without_a_kernel_refuse_it(int6):
    with pytest.raises(
        UsageError,
        match=r"^format int6 has no CPU kernel: choose fp32, bf16, fp16, fp8, int8, int4, int8_per_channel, int3, int2$",
    ):
        open_backend(None).cache(SHAPE, 800, "bf16", Recipe.parse("int6"))
    for text, last in (("int6", "int8_per_channel"), ("k=int4,v=int6,pages=1/4", "int4")):
        with pytest.raises(
            UsageError, match=rf"^format int6 has no CUDA kernel: choose bf16, fp16, fp8, int8, .*{last}, or the cpu backend$"
        ):
            decode_variant(128, 4, "bf16", Recipe.parse(text), "90")


@pytest.mark.parametrize("arch", ["61", "80", "90", "120"])
def test_cuda_refuses_3_bits_in_caches_and_in_an_engines_blocks(arch):
    refusal = (
        r"^format int[23] has no CUDA kernel: choose bf16, fp16, fp8, int8, int4(, int8_per_channel)?, or the cpu backend$"
    )
    for text in ("k=int4,v=int3", "v=int3,pages=1/4", "k=bf16,v=int3", "int3", "k=int3,v=int8,pages=1/4", "int2"):
        with pytest.raises(UsageError, match=refusal):
            decode_variant(128, 4, "bf16", Recipe.parse(text), arch)
        with pytest.raises(UsageError, match=refusal if arch != "61" else "need SM 8.0"):
            blocks_variant(128, 4, "bf16", Recipe.parse(text.partition(",pages")[0]), arch)
    assert set(unread_formats("cuda")) == {"int3", "int2"} == set(unread_formats(None)) and not unread_formats("cpu")


def test_no_two_formats_have_one_number():
    for field, shared in (("cpu_id", set()), ("cuda_id", {0}), ("cuda_dtype", set())):
        numbers = [getattr(f, field) for f in FORMATS.values() if getattr(f, field) is not None]
        assert {n for n in numbers if numbers.count(n) > 1} == shared, field
    assert sorted(f.cpu_id for f in FORMATS.values()) == list(range(len(FORMATS))), "kernels index tables by it"


def compared_names(path):
    """Yield the format names that a module compares something with."""
    names = {f.name for f in FORMATS.values() if not f.is_float}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            constants = (c for part in (node.left, *node.comparators) for c in ast.walk(part) if isinstance(c, ast.Constant))
            yield from (c.value for c in constants if c.value in names)


def test_only_the_table_says_what_a_format_is():
    files = [p for name in ("recipe", "kvcache", "backends", "evaluation") for p in (SOURCE / name).rglob("*.py")]
    comparing = {p.relative_to(SOURCE).as_posix(): set(compared_names(p)) for p in files}
    # CUDA has kernels for rows of int8 apart from those that read pages.
    assert not {name: names for name, names in comparing.items() if names and not (names == {"int8"} and "cuda" in name)}


# What a format with its own code width or its own scales is written in, besides the table.
PLACES = {
    "kvcache/quantize.py",
    "backends/cpu/page_codes.py",
    "backends/cpu/page_operands.py",
    "backends/cpu/blocks/block_dequantize.py",
    "backends/cpu/quantizers/nearest_pages.py",
    "backends/cuda/page_layout.py",
    "backends/cuda/kernels/format_codecs.cuh",
}
QUANTIZED = {f.name for f in FORMATS.values() if not f.is_float}
# Kernels for rows of int8, apart from those that read pages, are selected here. A format without such needs no line.
SELECTS_ROWS = {f"backends/cuda/{name}.py" for name in ("backend", "kernel_selection", "readback", "storage")}
SCORER = "kvcache/scorers/bounds.py"  # it ranks pages by the bounds of int4 keys
BUILDS = "backends/cuda/builds.py"  # recipes that tests compile


def formats_in_module(text):
    """Yield the formats that a module names, and what it compares of a format."""
    for node in ast.walk(ast.parse(text)):
        for name in (getattr(node, key, None) for key in ("id", "arg", "name", "asname")):
            yield from QUANTIZED & set(str(name).lower().split("_"))
        if isinstance(node, ast.Constant) and node.value in QUANTIZED:
            yield node.value
        if isinstance(node, ast.Attribute) and node.attr == "signed":
            yield "signed"
        if isinstance(node, ast.Compare) and "bits" in {getattr(n, "attr", "") for n in ast.walk(node)}:
            yield "bits"


def formats_in_kernel(text):
    """Yield the macros by which a kernel distinguishes formats of pages, outside of comments."""
    names = "|".join(name.upper() for name in QUANTIZED)
    return re.findall(rf"\b({names}|SIXTEEN_BIT|[KV]_FORMAT|[KV]_BITS (?===))\b", re.sub(r"//.*", "", text))


def test_a_format_is_in_the_table_and_seven_other_files():
    files = [p for name in ("kvcache", "backends") for p in (SOURCE / name).rglob("*.*") if p.suffix in {".py", ".cu", ".cuh"}]
    formats_of = {}
    for path in files:
        read = formats_in_module if path.suffix == ".py" else formats_in_kernel
        formats_of[path.relative_to(SOURCE).as_posix()] = set(read(path.read_text(encoding="utf-8")))
    assert all(formats_of[name] <= {"int8"} for name in SELECTS_ROWS)
    naming = {name for name, formats in formats_of.items() if formats} - SELECTS_ROWS - {BUILDS, SCORER}
    assert naming == PLACES and len(PLACES) <= 7


def test_extending_lists_these_files():
    text = (SOURCE.parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
    table = text.partition("## A KV format")[2].partition("\n\nThe first two")[0]
    listed = re.findall(r"`((?:recipe|kvcache|backends)/[\w/]+\.\w+)`", table)
    assert sorted(listed) == sorted({*PLACES, "recipe/formats.py"})


def test_kernels_get_numbers_codes_and_sizes_from_the_table(monkeypatch):
    variant = decode_variant(80, 4, "bf16", Recipe.parse("k=int4,v=int8"), "90")
    macros = format_macros(dict(variant.macros))
    names = {"bf16": "SIXTEEN_BIT", "fp16": "SIXTEEN_BIT", "fp8": "FP8", "int8": "INT8", "int4": "INT4"}
    names["int8_per_channel"] = "INT8_PER_CHANNEL"
    assert "INT3_LARGEST" not in macros, "no kernel reads it"
    assert {name: macros[macro] for name, macro in names.items()} == {
        f.name: f.cuda_id for f in FORMATS.values() if f.cuda_id is not None
    }
    assert FORMATS["int8"].cuda_rows == macros["COLD_INT8"]
    assert FORMATS["bf16"].cuda_rows == FORMATS["fp16"].cuda_rows == macros["COLD_SAME"]
    assert [macros[name] for name in ("INT8_LARGEST", "FP8_LARGEST", "INT4_LARGEST")] == [127, 448, 15]
    assert (macros["K_BITS"], macros["V_BITS"], macros["LARGEST_KEY"], macros["CHANNEL_LEVELS"]) == (4, 8, 65504, 15)
    # int4: a float16 scale and zero for each of 96 channels; int8: a bfloat16 scale for each of 32 tokens.
    assert (macros["KEY_SCALES"], macros["VALUE_SCALES"]) == (4 * 96, 2 * 32)
    wide = format_macros(dict(decode_variant(80, 4, "bf16", Recipe.parse("k=int8_per_channel,v=int8"), "90").macros))
    assert (wide["K_BITS"], wide["KEY_SCALES"], wide["CHANNEL_LEVELS"]) == (8, 4 * 96, 255)
    assert format_macros({"UNROLL": 4}) == {}
    kernels = "\n".join(p.read_text(encoding="utf-8") for p in (SOURCE / "backends/cuda/kernels").glob("*.cu*"))
    assert not set(re.findall(r"#define (\w+)", kernels)) & macros.keys(), "a kernel states what the table states"
    monkeypatch.setitem(FORMATS, "int4", dataclasses.replace(FORMATS["int4"], largest_code=14, values=ScaleLayout.TOKEN))
    changed = format_macros(dict(decode_variant(80, 4, "bf16", Recipe.parse("k=int8,v=int4"), "90").macros))
    assert (changed["INT4_LARGEST"], changed["VALUE_SCALES"]) == (14, 64)


@pytest.mark.parametrize("arch", ["61", "80", "90", "120"])
def test_cuda_refuses_rounding_by_hessians(arch):
    refusal = r"^rounding=gptq has no CUDA kernel: leave it out of .*, or use the cpu backend$"
    for text in ("int4,rounding=gptq", "int8,rounding=gptq", "int4,pages=1/4,rotate=v,rounding=gptq"):
        with pytest.raises(UsageError, match=refusal):
            decode_variant(128, 4, "bf16", Recipe.parse(text), arch)
