"""Pages that the CPU backend rounds by Hessians have the reference's codes, bit for bit, however the tokens came."""

import numpy as np
import pytest

from elastickv.backends.cpu import open_backend
from elastickv.backends.cpu.blocks import open_block_kernels
from elastickv.errors import UsageError
from elastickv.kvcache import ReferenceCache
from elastickv.kvcache.gptq import hessian_text, layer_compensation
from elastickv.recipe import AttentionShape, Recipe
from elastickv.recipe.calibration import StorageStatistics

TOKENS, HEADS = 300, 2
BIASES = (1.0, 10.0, 100.0, 1e3, 1e4)
TEXTS = [
    "int4", "int8", "int4,rotate=kv", "k=int4,v=int3,rotate=kv", "k=int8_per_channel,v=int4,vgroup=32",
    "k=fp8,v=int3,vgroup=32", "int4,pages=1/2", "int3", "k=int3,v=int8,rotate=kv",
    "int2", "int2,vgroup=32,rotate=kv",
]  # fmt: skip


def statistics_of(dim, seed=0):
    rng = np.random.default_rng(seed)

    def texts():
        mixed = rng.standard_normal((HEADS, dim, dim)) * np.exp(rng.standard_normal((HEADS, 1, dim)))
        return tuple(hessian_text(each.T @ each) for each in mixed)

    return StorageStatistics(None, texts(), texts())


def caches_of(text, dim, dtype="bf16", batch=1):
    recipe = Recipe.parse(f"{text},rounding=gptq,sinks=3,window=40")
    shape, chosen = AttentionShape(batch, 2 * HEADS, HEADS, dim), layer_compensation(recipe, dim, statistics_of(dim))
    arguments = (shape, TOKENS, dtype, recipe, 0, chosen)
    return open_backend(None).cache(*arguments), ReferenceCache(*arguments)


def tokens_of(dim, bias=0.0, batch=1, seed=1):
    keys, values = np.random.default_rng(seed).standard_normal((2, batch, HEADS, TOKENS, dim)).astype(np.float32)
    keys[..., 5] += np.float32(bias)
    keys[..., 7] = np.float32(bias)  # the same in all tokens: its scale is 0, or nearly
    return keys, values


def assert_alike(first, second):
    for row, head in np.ndindex(first.shape.batch, HEADS):
        ours, others = first.stored(row, head), second.stored(row, head)
        assert len(ours.cold_keys)
        for name in ("cold_keys", "cold_values", "exact_keys", "exact_values"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(others, name))


@pytest.mark.parametrize("dim", [64, 96])
@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_is_stored_in_the_references_codes(text, dim):
    cpu, reference = caches_of(text, dim)
    for cache in (cpu, reference):
        cache.prefill(*tokens_of(dim, 30.0), np.array([TOKENS]))
    assert_alike(cpu, reference)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("bias", BIASES)
def test_biases_change_nothing_about_that(bias, dtype):
    cpu, reference = caches_of("int3", 80, dtype)
    for cache in (cpu, reference):
        cache.prefill(*tokens_of(80, bias), np.array([TOKENS]))
    assert_alike(cpu, reference)


def test_tokens_that_come_one_by_one_are_stored_as_a_prompt_is():
    keys, values = tokens_of(64, 5.0, batch=2)
    prompt, steps = caches_of("int4,rotate=kv", 64, batch=2)[0], caches_of("int4,rotate=kv", 64, batch=2)[0]
    prompt.prefill(keys, values, np.array([TOKENS, TOKENS]))
    steps.prefill(keys[:, :, :50], values[:, :, :50], np.array([50, 50]))
    for token in range(50, TOKENS):
        steps.append(*(np.ascontiguousarray(each[:, :, token]) for each in (keys, values)))
    assert_alike(prompt, steps)


def test_a_copy_goes_on_rounding_so():
    keys, values = tokens_of(64)
    for cache in caches_of("int4", 64):
        cache.prefill(keys[:, :, :200], values[:, :, :200], np.array([200]))
        copy = cache.gather(np.array([0]), TOKENS)
        for each in (cache, copy):
            each.extend(
                np.ascontiguousarray(keys[:, :, 200:]), np.ascontiguousarray(values[:, :, 200:]), np.array([TOKENS - 200])
            )
        assert_alike(cache, copy)


def test_it_is_refused_without_hessians_and_in_an_engines_blocks():
    recipe, shape = Recipe.parse("int4,rounding=gptq"), AttentionShape(1, 4, 2, 64)
    with pytest.raises(UsageError, match="needs a calibration with Hessians"):
        open_backend(None).cache(shape, TOKENS, "bf16", recipe)
    with pytest.raises(UsageError, match="a serving engine's blocks have no rounding=gptq: leave it out"):
        open_block_kernels(shape, "bf16", recipe, 128)
