"""A KV format is a row of `FORMATS` and a codec: recipes, byte counts, the reference cache and the oracle need no more."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

import elastickv
from elastickv.backends.cpu import open_backend
from elastickv.backends.cuda.kernel_selection import decode_variant
from elastickv.errors import UsageError
from elastickv.kvcache import Oracle, ReferenceCache
from elastickv.kvcache.attention import attend
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.kvcache.quantize import CODECS, Codec, dequantize_int8
from elastickv.kvcache.rounding import from_bf16_bits, to_bf16_bits
from elastickv.recipe import AttentionShape, Recipe, predicted_loss, step_bytes, stored_bytes
from elastickv.recipe.formats import FORMATS, Format, ScaleLayout, cold_formats

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
    with pytest.raises(UsageError, match="formats are bf16, fp16, fp8, int8, int4, int6"):
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
    with pytest.raises(UsageError, match=r"^format int6 has no CPU kernel: choose fp32, bf16, fp16, fp8, int8, int4$"):
        open_backend(None).cache(SHAPE, 800, "bf16", Recipe.parse("int6"))
    for text in ("int6", "k=int4,v=int6,pages=1/4"):
        with pytest.raises(
            UsageError, match=r"^format int6 has no CUDA kernel: choose bf16, fp16, fp8, int8, int4, or the cpu"
        ):
            decode_variant(128, 4, "bf16", Recipe.parse(text), "90")


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


def test_cuda_headers_name_the_numbers_of_the_table():
    folder = SOURCE / "backends" / "cuda" / "kernels"
    text = "\n".join((folder / name).read_text(encoding="utf-8") for name in ("pages.cuh", "common.cuh"))
    macros = dict(re.findall(r"^#define (\w+) (\d+)\b", text, re.MULTILINE))
    names = {"bf16": "SIXTEEN_BIT", "fp16": "SIXTEEN_BIT", "fp8": "FP8", "int8": "INT8", "int4": "INT4"}
    assert {name: int(macros[macro]) for name, macro in names.items()} == {
        f.name: f.cuda_id for f in FORMATS.values() if f.cuda_id is not None
    }
    assert FORMATS["int8"].cuda_rows == int(macros["COLD_INT8"])
    assert FORMATS["bf16"].cuda_rows == FORMATS["fp16"].cuda_rows == int(macros["COLD_SAME"])
