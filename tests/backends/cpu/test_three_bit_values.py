"""Values in 3 bits: packed by pages, so that no row is padded, and the reference's numbers, bit for bit, of every head size."""

from typing import Any

import numpy as np
import pytest

from elastickv.backends.cpu import open_backend
from elastickv.backends.cpu.layout import plane_bytes
from elastickv.kvcache import Oracle, ReferenceCache
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.kvcache.quantize import dequantize_groups, quantize_int3_values
from elastickv.kvcache.rounding import rounded
from elastickv.recipe import HEAD_DIMS, PAGE_TOKENS, AttentionShape, Recipe
from elastickv.recipe.formats import FORMATS, value_groups

LENGTHS = np.array([331, 200, 40])
GROUPED_HEADS = [(dim, group) for dim in HEAD_DIMS for group in value_groups(dim)]
BIASES = (1.0, 10.0, 100.0, 1e3, 1e4)


def recipe_of(head_dim: int, group: int, keys: str = "int8", rest: str = "") -> Recipe:
    return Recipe.parse(f"k={keys},v=int3{f',vgroup={group}' if group < head_dim else ''}{rest}")


def values_of(shape: AttentionShape, tokens: int, bias: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(int(bias) + shape.head_dim)
    values = rng.standard_normal((shape.batch, shape.kv_heads, tokens, shape.head_dim), dtype=np.float32)
    values[..., ::5] += np.float32(bias)
    return rounded(values, "bf16")


def pair(recipe: Recipe, shape: AttentionShape, values: np.ndarray, lengths: np.ndarray) -> tuple[Any, Any]:
    """Return a cache of the CPU and one of the reference that hold the same tokens."""
    keys = values_of(shape, values.shape[2], 0.5)
    caches = open_backend(None).cache(shape, 400, "bf16", recipe), ReferenceCache(shape, 400, "bf16", recipe)
    for cache in caches:
        cache.prefill(keys, values, lengths)
    return caches


@pytest.mark.parametrize(("head_dim", "group"), GROUPED_HEADS)
def test_pages_of_ragged_sequences_hold_the_codes_of_the_reference(head_dim, group):
    shape = AttentionShape(3, 4, 2, head_dim)
    own, twin = pair(recipe_of(head_dim, group), shape, values_of(shape, 331), LENGTHS)
    more = values_of(shape, 30, 2)
    queries = np.random.default_rng(3).standard_normal((3, 4, head_dim), dtype=np.float32)
    for step in range(30):
        for cache in (own, twin):
            cache.append(more[:, :, step], more[:, :, -1 - step])
    for row, head in np.ndindex(3, 2):
        np.testing.assert_array_equal(own.stored(row, head).cold_values, twin.stored(row, head).cold_values)
    assert len(own.stored(0, 0).cold_values) == 224 and not len(own.stored(2, 0).cold_values)
    output, expected = own.decode(queries)[0], twin.decode(queries)[0]
    np.testing.assert_array_equal(expected, Oracle(own).decode(queries)[0])
    assert relative_l2(output, expected).max() < 1e-3


def test_every_code_at_every_token_reads_as_itself():
    """Codes of all three words of a column, the last two tokens' bits among them, with a scale of 1 and a zero of 0."""
    shape, rng = AttentionShape(1, 1, 1, 80), np.random.default_rng(1)
    codes = rng.integers(0, 8, (1, 1, 8 * PAGE_TOKENS, 80))
    codes[..., ::8], codes[..., 1::8] = 0, 7
    own, _ = pair(recipe_of(80, 40, rest=",sinks=0,window=0"), shape, codes.astype(np.float32), np.array([256]))
    np.testing.assert_array_equal(own.stored(0, 0).cold_values, codes[0, 0])
    np.testing.assert_array_equal(own.read(0, 256)[1], codes)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("group", [32, 128])
def test_the_reference_stores_what_numpy_quantizes_whatever_the_bias(bias, group):
    shape = AttentionShape(1, 2, 1, 128)
    values = values_of(shape, 192, bias)
    own, twin = pair(recipe_of(128, group, rest=",sinks=0,window=0"), shape, values, np.array([192]))
    grouped = values[0, 0].reshape(192, -1, group).astype(np.float64)
    low, high = grouped.min(-1, keepdims=True), grouped.max(-1, keepdims=True)
    stored = own.stored(0, 0).cold_values
    np.testing.assert_array_equal(stored, twin.stored(0, 0).cold_values)
    np.testing.assert_array_equal(stored, dequantize_groups(*quantize_int3_values(values[0, 0], group)))
    # Half a step of the group's range; zero and scale are rounded outward by up to 2^-7 of themselves.
    bound = (high - low + 2.0**-7 * np.abs(low)) / 14 * (1 + 2.0**-7) + 1e-6 * np.abs(high)
    assert (np.abs(stored.reshape(grouped.shape) - grouped) <= bound).all()
    queries = np.random.default_rng(4).standard_normal((1, 2, 128), dtype=np.float32)
    assert relative_l2(own.decode(queries)[0], twin.decode(queries)[0]).max() < 1e-3


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_page_has_exactly_three_bits_a_code(head_dim):
    fmt, page = FORMATS["int3"], PAGE_TOKENS * head_dim * 3 // 8
    assert PAGE_TOKENS * fmt.row_bytes(head_dim) == plane_bytes("int3", head_dim) == page
    assert page % 16 == 0, "16-byte vectors"
