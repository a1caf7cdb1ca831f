"""What a cache stores, refuses, remembers and reports."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from elastickv.backends import Backend
from elastickv.backends.cpu import backend as backend_module
from elastickv.backends.cpu.cache import CpuCache
from elastickv.errors import NonFiniteError, UsageError
from elastickv.kvcache import LayerCache, Oracle, ReferenceCache
from elastickv.recipe import HEAD_DIMS, AttentionShape, Recipe, stored_bytes
from elastickv.recipe.formats import value_groups

RECIPES = (
    "dense",
    "bf16",
    "fp16,window=0",
    "int8",
    "int8,sinks=33,window=31",
    "int8,stride=3,window=64",
    "bf16,stride=5,sinks=0",
    "int8,reuse,anchor_every=4",
    "int4",
    "fp8,sinks=33,window=31",
    "k=int8,v=int4,window=0",
    "k=int4,v=bf16,sinks=0",
    "k=fp8,v=int8",
    "int4,pages=1/4:1/2,anchor_every=4",
    "k=int4,v=fp8,pages=1/3,sinks=5,window=32",
)


def assert_same_storage(cache: LayerCache, twin: LayerCache) -> None:
    assert np.array_equal(cache.lengths, twin.lengths)
    for row in range(cache.shape.batch):
        for head in range(cache.shape.kv_heads):
            ours, theirs = cache.stored(row, head), twin.stored(row, head)
            for field in dataclasses.fields(ours):
                assert np.array_equal(getattr(ours, field.name), getattr(theirs, field.name)), field.name


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("text", RECIPES)
def test_codes_and_scales_are_those_of_the_reference(text: str, dtype: str, backend: Backend, driver: Any) -> None:
    shape, recipe = AttentionShape(2, 4, 2, 80), Recipe.parse(text)
    cache, twin = backend.cache(shape, 420, dtype, recipe), ReferenceCache(shape, 420, dtype, recipe)
    keys, values = driver.tokens(cache, 350)
    # Magnitudes from subnormal to overflowing halves, a row of zeros, and exact ties.
    keys *= np.float32(10.0) ** driver.rng.integers(-9, 4, keys.shape).astype(np.float32)
    values[:, :, 7] = 0
    values[:, :, 9] = np.linspace(-127, 127, 80).round() / 2
    for c in (cache, twin):
        c.prefill(keys, values, np.array([350, 165]))
    assert_same_storage(cache, twin)
    for _ in range(40):
        k, v = (a[:, :, 0] for a in driver.tokens(cache, 1))
        for c in (cache, twin):
            c.append(k, v)
    assert_same_storage(cache, twin)
    assert cache.step == twin.step == 39


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_is_stored_as_the_reference_stores_it(head_dim: int, backend: Backend, driver: Any) -> None:
    shape, recipe = AttentionShape(1, 1, 1, head_dim), Recipe.parse("int8,window=32")
    cache, twin = backend.cache(shape, 100, "fp16", recipe), ReferenceCache(shape, 100, "fp16", recipe)
    keys, values = driver.tokens(cache, 100)
    for c in (cache, twin):
        c.prefill(keys, values, np.array([100]))
    assert_same_storage(cache, twin)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_group_of_values_is_stored_as_the_reference_stores_it(head_dim: int, backend: Backend, driver: Any) -> None:
    shape = AttentionShape(1, 1, 1, head_dim)
    for group in value_groups(head_dim):
        recipe = Recipe.parse(f"k=fp8,v=int4,window=32,vgroup={group}")
        cache, twin = backend.cache(shape, 100, "bf16", recipe), ReferenceCache(shape, 100, "bf16", recipe)
        keys, values = driver.tokens(cache, 100)
        for c in (cache, twin):
            c.prefill(keys, values, np.array([100]))
        assert_same_storage(cache, twin)


@pytest.mark.parametrize("text", RECIPES)
def test_appending_one_by_one_equals_a_prefill(text: str, backend: Backend, driver: Any) -> None:
    shape, recipe = AttentionShape(1, 2, 2, 64), Recipe.parse(text)
    block, single = backend.cache(shape, 300, "bf16", recipe), backend.cache(shape, 300, "bf16", recipe)
    keys, values = driver.tokens(block, 300)
    block.prefill(keys, values, np.array([300]))
    for token in range(300):
        single.append(keys[:, :, token], values[:, :, token])
    assert_same_storage(block, single)


@pytest.mark.parametrize("text", [*RECIPES, "bf16,reuse,anchor_every=3,decay=0.9,sinks=0,window=0"])
def test_rewinding_restores_everything(text: str, backend: Backend, driver: Any) -> None:
    recipe = Recipe.parse(text)
    cache = backend.cache(AttentionShape(2, 4, 2, 64), 500, "bf16", recipe)
    cache.prefill(*driver.tokens(cache, 300), np.array([300, 140]))
    for _ in range(5):
        driver.append(cache)
        cache.decode(driver.queries(cache))
    script = [(driver.tokens(cache, 1), driver.queries(cache)) for _ in range(150)]

    def pages() -> list[int]:
        read = [cache.pages_read(row, head) for row in range(2) for head in range(2)]
        return [-1 if numbers is None else page for numbers in read for page in (numbers if numbers is not None else [0])]

    def play() -> list[np.ndarray]:
        outputs = []
        for (keys, values), queries in script:
            cache.append(keys[:, :, 0], values[:, :, 0])
            outputs.append(cache.decode(queries)[0])
        return outputs

    cache.mark()
    lengths, step, listed, first = cache.lengths, cache.step, pages(), play()
    cache.rewind()
    assert pages() == listed
    assert np.array_equal(cache.lengths, lengths)
    assert cache.step == step
    assert np.array_equal(first, play())


@pytest.mark.parametrize("anchor_offset", range(4))
@pytest.mark.parametrize("text", ["int8,reuse,anchor_every=4,window=0", "int4,pages=1/4,anchor_every=4,window=0"])
def test_rewinding_to_any_age_of_any_phase_repeats_what_followed(
    text: str, anchor_offset: int, backend: Backend, driver: Any
) -> None:
    cache = backend.cache(AttentionShape(2, 4, 2, 64), 400, "bf16", Recipe.parse(text), anchor_offset)
    cache.prefill(*driver.tokens(cache, 300), np.array([300, 140]))
    script = [(driver.tokens(cache, 1), driver.queries(cache)) for _ in range(12)]
    for marked in (1, 2, 3, 4):
        (keys, values), queries = script[marked - 1]
        cache.append(keys[:, :, 0], values[:, :, 0])
        cache.decode(queries)
        cache.mark()
        played = []
        for _ in range(2):
            cache.rewind()
            for (keys, values), queries in script[marked:]:
                cache.append(keys[:, :, 0], values[:, :, 0])
                played.append(cache.decode(queries)[0])
        assert np.array_equal(*np.split(np.array(played), 2))
        cache.rewind()


def test_random_tokens_repeat_by_seed_and_look_normal(backend: Backend) -> None:
    shape = AttentionShape(2, 4, 2, 64)
    caches = [backend.cache(shape, 600, "fp32", Recipe.parse("dense")) for _ in range(3)]
    for cache, seed in zip(caches, (5, 5, 6), strict=True):
        cache.fill_random(np.array([600, 33]), seed)
    assert_same_storage(caches[0], caches[1])
    keys = [cache.stored(0, head).exact_keys for cache in caches for head in range(2)]
    assert not np.array_equal(keys[0], keys[1])
    assert not np.array_equal(keys[0], keys[4])
    # 600 x 64 samples: the standard error of the mean is 0.005, of the variance 0.007.
    assert abs(keys[0].mean()) < 0.03
    assert abs(keys[0].var() - 1) < 0.04
    assert caches[0].step == -1


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("text", ["dense", "int8,stride=7", "int4", "fp8", "int4,pages=1/2"])
def test_a_value_that_is_not_finite_is_raised_with_its_position(text: str, bad: float, backend: Backend, driver: Any) -> None:
    cache = backend.cache(AttentionShape(2, 2, 2, 64), 300, "fp16", Recipe.parse(text))
    keys, values = driver.tokens(cache, 260)
    values[1, 1, 43, 9] = bad  # a half holds no 1e30
    cache.prefill(keys, values, np.array([260, 200]))
    with pytest.raises(NonFiniteError, match="sequence 1, KV head 1, position 43"):
        cache.raise_non_finite()
    cache.prefill(*driver.tokens(cache, 260), np.array([260, 200]))
    cache.raise_non_finite()
    cache.mark()
    k, v = (a[:, :, 0] for a in driver.tokens(cache, 1))
    k[0, 0, 63] = bad
    cache.append(k, v)
    with pytest.raises(NonFiniteError, match="sequence 0, KV head 0, position 260"):
        cache.raise_non_finite()
    cache.rewind()
    cache.raise_non_finite()
    assert np.isfinite(cache.decode(driver.queries(cache))[0]).all()


@pytest.mark.parametrize("text", ["int4", "k=int4,v=fp8,pages=1/4"])
def test_a_key_beyond_the_halves_of_int4_is_raised_once_it_is_quantised(text: str, backend: Backend, driver: Any) -> None:
    cache = backend.cache(AttentionShape(2, 2, 2, 64), 300, "bf16", Recipe.parse(text))
    keys, values = driver.tokens(cache, 260)
    keys[0, 1, [2, 250], 3] = 70000  # a sink and a token of the window: kept as they are
    keys[1, 0, 20, 5], keys[1, 1, 21, 6], values[1, 1, 30] = -65280, 65280, 1e30
    cache.prefill(keys, values, np.array([260, 200]))
    cache.raise_non_finite()
    keys[1, 1, 43, 9] = -70000
    cache.prefill(keys, values, np.array([260, 200]))
    with pytest.raises(NonFiniteError, match="sequence 1, KV head 1, position 43; int4 keys hold magnitudes up to 65504"):
        cache.raise_non_finite()


def test_a_full_cache_refuses_another_token(backend: Backend, driver: Any) -> None:
    cache = backend.cache(AttentionShape(2, 2, 2, 64), 40, "bf16", Recipe.parse("bf16"))
    with pytest.raises(UsageError, match="41 tokens does not fit a capacity of 40"):
        cache.prefill(*driver.tokens(cache, 41), np.array([41, 1]))
    cache.prefill(*driver.tokens(cache, 40), np.array([3, 40]))
    with pytest.raises(UsageError, match="sequence 1 holds 40 of 40 tokens"):
        driver.append(cache)
    assert np.array_equal(cache.lengths, [3, 40])


def test_arrays_of_a_wrong_shape_are_refused(backend: Backend) -> None:
    cache = backend.cache(AttentionShape(1, 2, 1, 64), 40, "bf16", Recipe.parse("dense"))
    with pytest.raises(ValueError, match="queries of shape"):
        cache.decode(np.zeros((1, 1, 64), np.float32))
    with pytest.raises(ValueError, match="keys of shape"):
        cache.append(*np.zeros((2, 1, 1, 80), np.float32))


def test_the_anchor_that_a_phase_needs_must_have_been_decoded(backend: Backend, driver: Any) -> None:
    recipe = Recipe.parse("bf16,reuse,anchor_every=4")
    cache = backend.cache(AttentionShape(1, 2, 1, 64), 400, "bf16", recipe, anchor_offset=2)
    assert cache.anchor_offset == 2
    cache.prefill(*driver.tokens(cache, 300), np.array([300]))
    for step in range(4):
        driver.append(cache)
        if step < 2:
            cache.decode(driver.queries(cache))
    with pytest.raises(RuntimeError, match="step 3 reuses the cold output of anchor 2, which was not decoded"):
        cache.decode(driver.queries(cache))


def test_a_reused_output_that_was_never_computed_is_refused(backend: Backend, driver: Any) -> None:
    cache = backend.cache(AttentionShape(1, 2, 1, 64), 400, "bf16", Recipe.parse("bf16,reuse,anchor_every=2"))
    cache.prefill(*driver.tokens(cache, 300), np.array([300]))
    driver.append(cache)
    driver.append(cache)
    with pytest.raises(RuntimeError, match="anchor 0, which was not decoded"):
        cache.decode(driver.queries(cache))
    listing = backend.cache(AttentionShape(1, 2, 1, 64), 400, "bf16", Recipe.parse("int4,pages=1/2,anchor_every=2"))
    listing.prefill(*driver.tokens(listing, 300), np.array([300]))
    driver.append(listing)
    driver.append(listing)
    with pytest.raises(RuntimeError, match="list of pages of anchor 0, which was not decoded"):
        listing.decode(driver.queries(listing))


@pytest.mark.parametrize("text", RECIPES)
def test_cache_bytes_are_the_bytes_allocated(text: str, backend: Backend) -> None:
    shape, recipe = AttentionShape(2, 8, 2, 96), Recipe.parse(text)
    cache = backend.cache(shape, 5000, "bf16", recipe)
    allocated = cache._buffer.nbytes + sum(copy.nbytes for copy in cache._snapshot)
    assert backend.cache_bytes(shape, 5000, "bf16", recipe) == allocated


@pytest.mark.parametrize("text", RECIPES)
def test_what_is_allocated_is_what_is_counted_but_for_padding(text: str, backend: Backend) -> None:
    shape, recipe, context = AttentionShape(1, 8, 8, 128), Recipe.parse(text.replace("1/4:1/2", "1/2")), 32768
    counted = stored_bytes(recipe, [context], shape, "bf16")
    allocated = backend.cache_bytes(shape, context, "bf16", recipe)
    # A ring of one more page than the window needs, its copy, partial results, scores.
    assert counted - 4096 <= allocated < 1.04 * counted


def test_a_cache_that_does_not_fit_is_refused_before_it_is_allocated(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, recipe = AttentionShape(1, 8, 8, 128), Recipe.parse("int8")
    fits = 10_000
    free = backend.cache_bytes(shape, fits, "bf16", recipe)
    described = dataclasses.replace(backend.device, free_bytes=free)
    monkeypatch.setattr(backend_module, "describe", lambda: described)
    monkeypatch.setattr(CpuCache, "__init__", lambda *_: pytest.fail("allocated"))
    needed = backend.cache_bytes(shape, 20_000, "bf16", recipe)
    with pytest.raises(UsageError, match=rf"needs {needed} bytes .*; {free} .* are free; a context of (\d+) tokens") as refusal:
        backend.cache(shape, 20_000, "bf16", recipe)
    named = int(str(refusal.value).split("a context of ")[1].split()[0])
    assert fits <= named < fits + 32
    assert backend.cache_bytes(shape, named, "bf16", recipe) <= free


def test_bad_arguments_are_refused_with_what_is_accepted(backend: Backend) -> None:
    shape = AttentionShape(1, 1, 1, 64)
    with pytest.raises(UsageError, match="fp32, fp16, bf16"):
        backend.cache(shape, 10, "fp64", Recipe.parse("dense"))
    with pytest.raises(UsageError, match="capacity of 0"):
        backend.cache(shape, 0, "fp32", Recipe.parse("dense"))
    with pytest.raises(UsageError, match="vgroup=48 does not divide a head of 64"):
        backend.cache(shape, 10, "bf16", Recipe.parse("int4,vgroup=48"))
    with pytest.raises(UsageError, match="2 fractions for 1 KV heads"):
        backend.cache(shape, 10, "bf16", Recipe.parse("int4,pages=1/2:1/4"))
    for anchor_offset in (-1, 4):
        with pytest.raises(ValueError, match=rf"anchor_offset {anchor_offset} is out of range: .* takes 0 to 3"):
            backend.cache(shape, 10, "bf16", Recipe.parse("bf16,reuse,anchor_every=4"), anchor_offset)


@pytest.mark.parametrize("text", ["int8", "int4", "fp8", "int4,pages=1"])
def test_decoding_a_cache_of_zeros_gives_zeros(text: str, backend: Backend, driver: Any) -> None:
    cache = backend.cache(AttentionShape(1, 2, 1, 64), 300, "bf16", Recipe.parse(text))
    zeros = np.zeros((1, 1, 300, 64), np.float32)
    cache.prefill(zeros, zeros, np.array([300]))
    output, lse = cache.decode(driver.queries(cache))
    assert not output.any()
    assert np.allclose(lse, np.log(300))
    assert np.array_equal(output, Oracle(cache).decode(driver.queries(cache))[0])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("int8", ["quantize_int8", "quantize_int8"]),
        ("k=int8,v=int4", ["quantize_int8", "quantize_values_int4"]),
        ("k=int4,v=fp8", ["quantize_keys_int4", "quantize_fp8"]),
        ("int8,stride=3", ["store_rows", "store_rows"]),
        ("k=bf16,v=int4", ["store_rows", "quantize_values_int4"]),
        ("k=fp8,v=int3", ["quantize_fp8", "quantize_values_int3"]),
        ("k=int3,v=int2", ["quantize_keys_int3", "quantize_values_int2"]),
        ("k=int2,v=int8", ["quantize_keys_int2", "quantize_int8"]),
    ],
)
def test_a_page_goes_to_the_vector_quantizers_of_its_formats(text: str, names: list[str], backend: Backend) -> None:
    from elastickv.backends.cpu.layout import BufferField
    from elastickv.backends.cpu.quantizers import nearest_pages

    recipe = Recipe.parse(text)
    kernels = nearest_pages.quantizers(recipe, "bf16")
    assert [kernel.name for kernel in kernels] == [f"quantizers.nearest_pages.{name}" for name in names]
    cache = backend.cache(AttentionShape(1, 1, 1, 64), 100, "bf16", recipe)
    used = cache.descriptor[[BufferField.QUANTIZE_KEYS, BufferField.QUANTIZE_VALUES]]
    assert used.tolist() == [kernel.address for kernel in kernels]
