"""The cache that the back ends are held against follows the definitions of the recipe."""

import numpy as np
import pytest

from elastickv.attention import attend, merge
from elastickv.cache import ReferenceCache
from elastickv.cache.bits import rounded
from elastickv.errors import NonFiniteError, UsageError
from elastickv.recipe import AttentionShape, Recipe

SHAPE = AttentionShape(2, 4, 2, 64)


def tokens(count, seed=0):
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((400, 2, SHAPE.batch, SHAPE.kv_heads, SHAPE.head_dim)).astype(np.float32)
    return np.moveaxis(drawn[:count], 0, 3)


def queries(seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((SHAPE.batch, SHAPE.query_heads, SHAPE.head_dim)).astype(np.float32)


def filled(text, lengths, capacity=400, dtype="bf16"):
    cache = ReferenceCache(SHAPE, capacity, dtype, Recipe.parse(text))
    cache.prefill(*tokens(max(lengths)), np.array(lengths))
    return cache


def test_dense_fp32_is_plain_attention():
    cache, q = filled("dense", [300, 17], dtype="fp32"), queries()
    keys, values = tokens(300)
    output, lse = cache.decode(q)
    expected = attend(q[1, 2:], keys[1, 1, :17], values[1, 1, :17])
    np.testing.assert_allclose(output[1, 2:], expected.output)
    np.testing.assert_allclose(lse[1, 2:], expected.lse)


@pytest.mark.parametrize("text", ["int8", "bf16,stride=3", "int8,stride=5", "bf16,reuse,anchor_every=3"])
def test_appending_one_by_one_stores_what_a_block_stores(text):
    block, steps = filled(text, [330, 250]), filled(text, [200, 120])
    keys, values = tokens(330)
    for i in range(130):
        at = np.array([200, 120]) + i
        steps.append(keys[[0, 1], :, at], values[[0, 1], :, at])
    for row in range(2):
        one, other = block.stored(row, 1), steps.stored(row, 1)
        for name in ("cold_keys", "cold_values", "exact_keys", "exact_values"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_stride_gives_dropped_tokens_mass_to_the_kept():
    cache = filled("bf16,stride=4,sinks=0,window=32", [160, 160])
    # Equal keys: every token weighs the same, so the log-sum-exp is that of all 160.
    keys, values = tokens(160)
    cache.prefill(np.ones_like(keys), values, np.array([160, 160]))
    q = queries()
    _, lse = cache.decode(q)
    np.testing.assert_allclose(lse, q.sum(-1) / 8 + np.log(160), rtol=1e-6)


def test_reuse_merges_the_anchors_output_with_what_came_since():
    recipe = "bf16,reuse,anchor_every=3,decay=0.5,sinks=2,window=8"
    cache, reference = filled(recipe, [100, 100]), tokens(200)
    outputs = []
    for i in range(3):
        cache.append(reference[0][:, :, 150 + i], reference[1][:, :, 150 + i])
        outputs.append(cache.decode(queries(i)))
    length, age = 103, 2
    stored = cache.stored(0, 0)
    at_anchor = (101 - 2 - 8) // 32 * 32
    cold = attend(queries(0)[0, :2], stored.cold_keys[:at_anchor], stored.cold_values[:at_anchor])
    fresh = attend(queries(2)[0, :2], stored.cold_keys[at_anchor:], stored.cold_values[at_anchor:])
    exact = attend(queries(2)[0, :2], stored.exact_keys, stored.exact_values)
    expected = merge(cold.weighted(age * np.log(0.5)), fresh, exact)
    np.testing.assert_allclose(outputs[2][0][0, :2], expected.output)
    assert len(stored.exact_keys) + len(stored.cold_keys) == length


def test_the_window_is_exact_and_the_rest_is_rounded():
    cache = filled("int8", [300, 300])
    keys = rounded(tokens(300)[0][0, 0], "bf16")
    stored = cache.stored(0, 0)
    np.testing.assert_array_equal(stored.exact_keys[:4], keys[:4])
    np.testing.assert_array_equal(stored.exact_keys[-128:], keys[-128:])
    error = np.abs(stored.cold_keys - keys[4 : 4 + len(stored.cold_keys)])
    assert 0 < error.max() < 0.04


def test_rewind_forgets_what_was_appended():
    cache = filled("int8", [200, 150])
    before = cache.decode(queries())[0]
    cache.mark()
    cache.append(*tokens(1, seed=5)[:, :, :, 0])
    assert (cache.decode(queries())[0] != before).any()
    cache.rewind()
    np.testing.assert_array_equal(cache.decode(queries())[0], before)


def test_a_full_cache_says_so():
    cache = filled("dense", [10, 4], capacity=10)
    with pytest.raises(UsageError, match="sequence 0 holds 10 of 10"):
        cache.append(*tokens(1)[:, :, :, 0])


def test_a_nan_is_raised_with_its_position():
    cache = filled("int8", [200, 150])
    bad = tokens(1)[:, :, :, 0]
    bad[1, 1, 0, 3] = np.nan
    cache.append(bad[0], bad[1])
    with pytest.raises(NonFiniteError, match="sequence 1, KV head 0, position 150"):
        cache.raise_non_finite()
