"""Decoding agrees with the float64 reference on what the cache says it stores."""

from typing import Any

import numpy as np
import pytest

from elastickv.backends.cpu import open_backend
from elastickv.kvcache import Oracle, ReferenceCache
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.recipe import HEAD_DIMS, AttentionShape, Recipe

LIMIT = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 4e-3}
RECIPES = (
    "dense",
    "bf16",
    "fp16",
    "int8",
    "int8,sinks=0,window=0",
    "bf16,sinks=40,window=17",
    "bf16,stride=2,window=32",
    "int8,stride=3",
    "fp16,stride=64,sinks=1,window=0",
    "bf16,reuse,anchor_every=3,decay=0.9,window=32",
    "int8,reuse,anchor_every=2,sinks=0,window=0",
    "fp16,window=5000",
    "int4",
    "int4,vgroup=32,window=0",
    "fp8,sinks=0",
    "k=int8,v=int4",
    "k=int4,v=bf16,window=17",
    "k=fp16,v=fp8",
    "k=int8_per_channel,v=int8",
    "k=int8_per_channel,v=int4,pages=1/3,window=0",
    "k=int8,v=int3,vgroup=32",
    "int3,pages=1/4,anchor_every=2",
    "int2,vgroup=32",
    "k=int2,v=int3,pages=1/3",
    "int4,pages=1/4",
    "int4,pages=1/2:1/5,anchor_every=4,window=0",
    "k=int4,v=int8,pages=1/8,anchor_every=33,sinks=0,window=0",
)
NARROW = ("int4", "int4,pages=1/4", "fp8", "k=int8_per_channel,v=int8", "int3", "int2")
GROUPS = (1, 2, 3, 4, 5, 7, 8, 9, 16)


def limit(dtype: str, recipe: Recipe) -> float:
    return LIMIT[dtype if recipe.is_dense else "bf16"]


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("text", RECIPES)
def test_every_recipe_decodes_like_the_reference_while_the_context_grows(text: str, dtype: str, driver: Any) -> None:
    recipe = Recipe.parse(text)
    cache = open_backend(None).cache(AttentionShape(2, 6, 2, 64), 400, dtype, recipe)
    oracle = Oracle(cache)
    cache.prefill(*driver.tokens(cache, 300), np.array([300, 129]))
    assert driver.error(cache, oracle) < limit(dtype, recipe)
    for _ in range(40):
        driver.append(cache)
        assert driver.error(cache, oracle) < limit(dtype, recipe)


@pytest.mark.parametrize("anchor_offset", [1, 2, 4])
@pytest.mark.parametrize(
    "text",
    [
        "bf16,reuse,anchor_every=5,decay=0.9,window=32",
        "int8,reuse,anchor_every=5,sinks=0,window=0",
        "int4,pages=1/2:1/5,anchor_every=5,window=0",
        "k=int4,v=int8,pages=1/8,anchor_every=5",
    ],
)
def test_every_phase_decodes_and_reads_like_the_reference(text: str, anchor_offset: int, driver: Any) -> None:
    recipe, shape = Recipe.parse(text), AttentionShape(2, 6, 2, 64)
    cache, twin = (new(shape, 400, "bf16", recipe, anchor_offset) for new in (open_backend(None).cache, ReferenceCache))
    tokens = driver.tokens(cache, 300)
    for c in (cache, twin):
        c.prefill(*tokens, np.array([300, 190]))
    for step in range(38):
        keys, values = (a[:, :, 0] for a in driver.tokens(cache, 1))
        queries = driver.queries(cache)
        for c in (cache, twin):
            c.append(keys, values)
        output, expected = cache.decode(queries)[0], twin.decode(queries)[0]
        assert relative_l2(output, expected).max() < LIMIT["bf16"], step
        for row, head in np.ndindex(2, 2):
            assert np.array_equal(cache.pages_read(row, head), twin.pages_read(row, head)), step


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    "text",
    [
        "dense",
        "int8,window=32",
        "bf16,stride=2,window=0",
        "int4,window=32",
        "fp8,window=0",
        "int4,pages=1/2,window=0",
        "k=int8_per_channel,v=bf16,pages=1/2,window=0",
        "int3,window=0",
        "int2,window=0",
    ],
)
def test_every_head_dim_decodes_like_the_reference(text: str, head_dim: int, driver: Any) -> None:
    for dtype in LIMIT:
        recipe = Recipe.parse(text)
        cache = open_backend(None).cache(AttentionShape(1, 4, 2, head_dim), 161, dtype, recipe)
        cache.prefill(*driver.tokens(cache, 161), np.array([161]))
        assert driver.error(cache, Oracle(cache)) < limit(dtype, recipe)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("text", ["dense", "int8", *NARROW])
def test_every_group_size_decodes_like_the_reference(text: str, group: int, driver: Any) -> None:
    recipe = Recipe.parse(text)
    cache = open_backend(None).cache(AttentionShape(1, 2 * group, 2, 80), 333, "fp32", recipe)
    cache.prefill(*driver.tokens(cache, 333), np.array([333]))
    assert driver.error(cache, Oracle(cache)) < limit("fp32", recipe)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65, 131, 132, 163, 164, 165, 4095, 4096, 4097, 9000])
def test_every_length_decodes_like_the_reference(length: int, driver: Any) -> None:
    for text in ("dense", "int8", "bf16,stride=4", *NARROW):
        recipe = Recipe.parse(text)
        cache = open_backend(None).cache(AttentionShape(1, 2, 1, 64), length, "bf16", recipe)
        cache.prefill(*driver.tokens(cache, length), np.array([length]))
        assert driver.error(cache, Oracle(cache)) < limit("bf16", recipe)


def test_a_context_longer_than_one_float_sum_can_hold_stays_within_the_limit(driver: Any) -> None:
    cache = open_backend(None).cache(AttentionShape(1, 1, 1, 64), 1 << 18, "fp32", Recipe.parse("dense"))
    cache.fill_random(np.array([1 << 18]), seed=3)
    assert driver.error(cache, Oracle(cache)) < LIMIT["fp32"]


@pytest.mark.parametrize("dtype", LIMIT)
def test_one_token_that_outweighs_all_others_is_returned(dtype: str) -> None:
    narrow = ("int8", "k=int4,v=bf16", "k=fp8,v=int8", "k=int4,v=int8,pages=1/8")
    for text in ("dense", *(f"{formats},sinks=0,window=0" for formats in narrow)):
        recipe = Recipe.parse(text)
        cache = open_backend(None).cache(AttentionShape(1, 1, 1, 64), 320, dtype, recipe)
        keys, values = np.zeros((2, 1, 1, 320, 64), np.float32)
        keys[0, 0, 77], values[0, 0, 77] = 8, np.arange(64)
        keys[0, 0, 78:] = -8
        cache.prefill(keys, values, np.array([320]))
        output, lse = cache.decode(np.full((1, 1, 64), 8, np.float32))
        assert np.allclose(output[0, 0], np.arange(64), rtol=1e-2)
        assert np.allclose(lse, 64 * 64 / 8, rtol=1e-2)


def test_decoding_again_repeats_the_result_bit_for_bit(driver: Any) -> None:
    for text in ("dense", "int8", "bf16,reuse,anchor_every=2,window=32", "int4", "int4,pages=1/3,anchor_every=2"):
        cache = open_backend(None).cache(AttentionShape(2, 8, 2, 128), 700, "bf16", Recipe.parse(text))
        cache.prefill(*driver.tokens(cache, 650), np.array([650, 20]))
        queries = driver.queries(cache)
        for _ in range(3):
            first, first_lse = cache.decode(queries)
            for _ in range(5):
                again, again_lse = cache.decode(queries)
                assert np.array_equal(first, again)
                assert np.array_equal(first_lse, again_lse)
            driver.append(cache)


def test_a_query_that_is_not_finite_leaves_no_finite_output(driver: Any) -> None:
    for text in ("dense", "int8", "fp8", "int4", "k=bf16,v=int4"):
        cache = open_backend(None).cache(AttentionShape(1, 2, 1, 64), 400, "bf16", Recipe.parse(text))
        cache.prefill(*driver.tokens(cache, 400), np.array([400]))
        queries = driver.queries(cache)
        queries[0, 1, 5] = np.nan
        output, _ = cache.decode(queries)
        assert np.isfinite(output[0, 0]).all()
        assert not np.isfinite(output[0, 1]).any()
