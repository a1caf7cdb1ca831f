"""Keys and values in 3 and 2 bits: the numbers of the reference, bit for bit, of every head size.

Rows are packed together, so that no row is padded: 32 of values in 3 bits, 16 in 2. Of keys so many channels are, and in 3
bits 80 and 112 are padded.
"""

from typing import Any

import numpy as np
import pytest

from elastickv.backends.cpu import open_backend
from elastickv.backends.cpu.layout import bounds_bytes, key_plane_bytes, plane_bytes, scale_bytes
from elastickv.kvcache import Oracle, ReferenceCache
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.kvcache.quantize import (
    dequantize_channels,
    dequantize_groups,
    quantize_int2_keys,
    quantize_int2_values,
    quantize_int3_keys,
    quantize_int3_values,
)
from elastickv.kvcache.rounding import rounded
from elastickv.recipe import HEAD_DIMS, PAGE_TOKENS, AttentionShape, Recipe
from elastickv.recipe.byte_counts import page_bytes
from elastickv.recipe.formats import FORMATS, value_groups

KEYS = {"int3": quantize_int3_keys, "int2": quantize_int2_keys}
VALUES = {"int3": quantize_int3_values, "int2": quantize_int2_values}
LENGTHS = np.array([331, 200, 40])
GROUPED_HEADS = [(dim, group) for dim in HEAD_DIMS for group in value_groups(dim)]
BIASES = (1.0, 10.0, 100.0, 1e3, 1e4)


BITS = pytest.mark.parametrize("fmt", ["int3", "int2"])
LEVELS = {"int3": 7, "int2": 3}


def recipe_of(fmt: str, head_dim: int, group: int, keys: str = "int8", rest: str = "") -> Recipe:
    return Recipe.parse(f"k={keys},v={fmt}{f',vgroup={group}' if group < head_dim else ''}{rest}")


def values_of(shape: AttentionShape, tokens: int, bias: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(int(bias) + shape.head_dim)
    values = rng.standard_normal((shape.batch, shape.kv_heads, tokens, shape.head_dim), dtype=np.float32)
    values[..., ::5] += np.float32(bias)
    return rounded(values, "bf16")


def pair(
    recipe: Recipe, shape: AttentionShape, values: np.ndarray, lengths: np.ndarray, keys: np.ndarray | None = None
) -> tuple[Any, Any]:
    """Return a cache of the CPU and one of the reference that hold the same tokens."""
    keys = values_of(shape, values.shape[2], 0.5) if keys is None else keys
    caches = open_backend(None).cache(shape, 400, "bf16", recipe), ReferenceCache(shape, 400, "bf16", recipe)
    for cache in caches:
        cache.prefill(keys, values, lengths)
    return caches


def go_on(*caches: Any) -> None:
    """Append the same 30 tokens to caches."""
    more = values_of(caches[0].shape, 30, 2)
    for step in range(30):
        for cache in caches:
            cache.append(more[:, :, step], more[:, :, -1 - step])


def assert_decodes_alike(own: Any, twin: Any) -> None:
    shape = own.shape
    queries = np.random.default_rng(3).standard_normal((shape.batch, shape.query_heads, shape.head_dim), dtype=np.float32)
    output, expected = own.decode(queries)[0], twin.decode(queries)[0]
    np.testing.assert_array_equal(expected, Oracle(own).decode(queries)[0])
    assert relative_l2(output, expected).max() < 1e-3


@BITS
@pytest.mark.parametrize(("head_dim", "group"), GROUPED_HEADS)
def test_pages_of_ragged_sequences_hold_the_codes_of_the_reference(fmt, head_dim, group):
    shape = AttentionShape(3, 4, 2, head_dim)
    own, twin = pair(recipe_of(fmt, head_dim, group), shape, values_of(shape, 331), LENGTHS)
    go_on(own, twin)
    for row, head in np.ndindex(3, 2):
        np.testing.assert_array_equal(own.stored(row, head).cold_values, twin.stored(row, head).cold_values)
    assert len(own.stored(0, 0).cold_values) == 224 and not len(own.stored(2, 0).cold_values)
    assert_decodes_alike(own, twin)


@BITS
def test_every_code_at_every_token_reads_as_itself(fmt):
    """Codes of all words of a column, with a scale of 1 and a zero of 0."""
    shape, rng = AttentionShape(1, 1, 1, 80), np.random.default_rng(1)
    codes = rng.integers(0, LEVELS[fmt] + 1, (1, 1, 8 * PAGE_TOKENS, 80))
    codes[..., ::8], codes[..., 1::8] = 0, LEVELS[fmt]
    own, _ = pair(recipe_of(fmt, 80, 40, rest=",sinks=0,window=0"), shape, codes.astype(np.float32), np.array([256]))
    np.testing.assert_array_equal(own.stored(0, 0).cold_values, codes[0, 0])
    np.testing.assert_array_equal(own.read(0, 256)[1], codes)


@BITS
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("group", [32, 128])
def test_the_reference_stores_what_numpy_quantizes_whatever_the_bias(fmt, bias, group):
    shape = AttentionShape(1, 2, 1, 128)
    values = values_of(shape, 192, bias)
    own, twin = pair(recipe_of(fmt, 128, group, rest=",sinks=0,window=0"), shape, values, np.array([192]))
    grouped = values[0, 0].reshape(192, -1, group).astype(np.float64)
    low, high = grouped.min(-1, keepdims=True), grouped.max(-1, keepdims=True)
    stored = own.stored(0, 0).cold_values
    np.testing.assert_array_equal(stored, twin.stored(0, 0).cold_values)
    np.testing.assert_array_equal(stored, dequantize_groups(*VALUES[fmt](values[0, 0], group)))
    # Half a step of the group's range; zero and scale are rounded outward by up to 2^-7 of themselves.
    bound = (high - low + 2.0**-7 * np.abs(low)) / (2 * LEVELS[fmt]) * (1 + 2.0**-7) + 1e-6 * np.abs(high)
    assert (np.abs(stored.reshape(grouped.shape) - grouped) <= bound).all()
    queries = np.random.default_rng(4).standard_normal((1, 2, 128), dtype=np.float32)
    assert relative_l2(own.decode(queries)[0], twin.decode(queries)[0]).max() < 1e-3


@BITS
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_no_code_of_a_page_is_padded_but_those_of_the_last_channels_of_a_key(fmt, head_dim):
    bits, together = FORMATS[fmt].bits, {"int3": 32, "int2": 16}[fmt]
    page = PAGE_TOKENS * head_dim * bits // 8
    assert PAGE_TOKENS * FORMATS[fmt].row_bytes(head_dim) == plane_bytes(fmt, head_dim) == page
    of_keys = PAGE_TOKENS * -(-head_dim // together) * together * bits // 8
    assert PAGE_TOKENS * FORMATS[fmt].key_row_bytes(head_dim) == key_plane_bytes(fmt, head_dim) == of_keys
    assert page % 16 == of_keys % 16 == 0, "16-byte vectors"
    stored = of_keys + page + bounds_bytes(fmt, head_dim) + scale_bytes(fmt, head_dim, head_dim, True)
    assert page_bytes(Recipe(fmt, fmt), head_dim) == stored, "what is counted is what is stored"


@BITS
@pytest.mark.parametrize("rest", ["", ",pages=1/2", ",rotate=kv"])
@pytest.mark.parametrize("values", ["int3", "int8"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_keys_of_ragged_sequences_are_those_of_the_reference(fmt, head_dim, values, rest):
    shape, recipe = AttentionShape(3, 4, 2, head_dim), Recipe.parse(f"k={fmt},v={values}{rest}")
    own, twin = pair(recipe, shape, values_of(shape, 331), LENGTHS)
    go_on(own, twin)
    for row, head in np.ndindex(3, 2):
        np.testing.assert_array_equal(own.stored(row, head).cold_keys, twin.stored(row, head).cold_keys)
    assert_decodes_alike(own, twin)


@BITS
@pytest.mark.parametrize("head_dim", [64, 80, 112])
def test_every_code_of_every_channel_of_a_key_reads_as_itself(fmt, head_dim):
    """Codes of all words of a token, with a scale of 1 and a zero of 0."""
    shape, rng = AttentionShape(1, 1, 1, head_dim), np.random.default_rng(1)
    codes = rng.integers(0, LEVELS[fmt] + 1, (1, 1, 8 * PAGE_TOKENS, head_dim))
    codes[..., ::8, :], codes[..., 1::8, :] = 0, LEVELS[fmt]
    recipe = Recipe.parse(f"k={fmt},v=int8,sinks=0,window=0")
    own, _ = pair(recipe, shape, np.ones_like(codes, np.float32), np.array([256]), codes.astype(np.float32))
    np.testing.assert_array_equal(own.stored(0, 0).cold_keys, codes[0, 0])
    np.testing.assert_array_equal(own.read(0, 256)[0], codes)


@BITS
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("channel", [0, 63], ids=["fast", "slow"])
def test_the_error_of_a_key_is_half_a_step_of_its_own_channel_whatever_the_bias(fmt, bias, channel):
    """Rotary embedding turns channel 0 fastest: it takes both signs of its bias; channel 63 hardly turns."""
    shape = AttentionShape(1, 2, 1, 128)
    keys = values_of(shape, 192)
    angle = np.arange(192) * 10000.0 ** (-channel / 64)
    keys[0, 0, :, channel] += bias * np.cos(angle)
    keys[0, 0, :, channel + 64] += bias * np.sin(angle)
    keys = rounded(keys, "bf16")
    recipe = Recipe.parse(f"k={fmt},v=int8,sinks=0,window=0")
    own, twin = pair(recipe, shape, values_of(shape, 192), np.array([192]), keys)
    stored = own.stored(0, 0).cold_keys
    np.testing.assert_array_equal(stored, twin.stored(0, 0).cold_keys)
    pages = keys[0, 0].reshape(-1, PAGE_TOKENS, 128).astype(np.float64)
    np.testing.assert_array_equal(stored, dequantize_channels(*KEYS[fmt](pages)).reshape(stored.shape))
    low, high = pages.min(1, keepdims=True), pages.max(1, keepdims=True)
    # Zero and scale are rounded outward by up to 2^-10 of themselves, or 2^-24.
    bound = (high - low + 2.0**-10 * np.abs(low)) / (2 * LEVELS[fmt]) * (1 + 2.0**-10) + 1e-6 * np.abs(high) + 2.0**-23
    assert (np.abs(stored.reshape(pages.shape) - pages) <= bound).all()
    if channel:  # the folded query of a fast channel has more of a step than the others can stand beside; int4's, too
        queries = np.random.default_rng(4).standard_normal((1, 2, 128), dtype=np.float32)
        assert relative_l2(own.decode(queries)[0], twin.decode(queries)[0]).max() < 1e-3
