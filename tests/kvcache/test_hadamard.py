"""The rotation of heads: its matrix, and what it does to attention, to large numbers and to what formats lose."""

import numpy as np
import pytest

from elastickv.kvcache import ReferenceCache
from elastickv.kvcache.attention import attend
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.kvcache.hadamard import rotated, rotated_block, rotated_tokens
from elastickv.kvcache.rounding import rounded
from elastickv.recipe import HEAD_DIMS, AttentionShape, Recipe

TOKENS = 256


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_block_is_multiplied_by_the_hadamard_matrix_which_is_its_own_inverse(head_dim):
    size = rotated_block(head_dim)
    assert size == {80: 16, 96: 32, 112: 16, 192: 64}.get(head_dim, head_dim)
    rows = np.random.default_rng(head_dim).standard_normal((3, 5, head_dim))
    # Sylvester's matrix: its element is -1 to the number of ones that two numbers share in binary.
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    matrix = np.kron(np.eye(head_dim // size), np.array(signs) / np.sqrt(size))
    np.testing.assert_allclose(rotated(rows), rows @ matrix, rtol=0, atol=1e-13)
    np.testing.assert_allclose(rotated(rotated(rows)), rows, rtol=0, atol=1e-13)
    single = rows.astype(np.float32)
    assert rotated(single).dtype == np.float32
    np.testing.assert_allclose(rotated(single), rotated(rows), rtol=0, atol=1e-5)


def test_what_is_not_finite_stays_so_and_stays_in_its_block():
    rows = np.ones((2, 96), np.float32)
    rows[0, 40], rows[1, 70] = np.inf, np.nan
    wrong = ~np.isfinite(rotated(rows))
    assert wrong[0, 32:64].all() and wrong[1, 64:].all() and wrong.sum() == 64


def test_a_recipe_says_which_of_keys_and_values_are_rotated():
    keys, values = np.random.default_rng(0).standard_normal((2, 4, 64))
    for text, changed in (("int4", ""), ("int4,rotate=k", "k"), ("int4,rotate=v", "v"), ("int4,rotate=kv", "kv")):
        turned = rotated_tokens(keys, values, Recipe.parse(text))
        for letter, rows, result in zip("kv", (keys, values), turned, strict=True):
            np.testing.assert_array_equal(result, rotated(rows) if letter in changed else rows)


def error(text, keys, values, queries):
    """Return the error of the output against attention to keys and values as they are."""
    cache = ReferenceCache(AttentionShape(1, 4, 1, 64), TOKENS, "bf16", Recipe.parse(f"{text},sinks=0,window=0"))
    cache.prefill(keys, values, np.array([TOKENS]))
    return relative_l2(cache.decode(queries)[0][0], attend(queries[0], keys[0, 0], values[0, 0]).output).max()


def tokens():
    rng = np.random.default_rng(1)
    return rng.standard_normal((2, 1, 1, TOKENS, 64), np.float32), rng.standard_normal((1, 4, 64), np.float32)


@pytest.mark.parametrize("bias", [1.0, 10.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize("keys_in", ["int8", "int8_per_channel", "fp8", "int4"])
def test_attention_is_the_same_in_exact_tokens_and_close_in_stored_ones_whatever_the_bias_of_a_channel(bias, keys_in):
    (keys, values), queries = tokens()
    keys[..., 9] += bias
    values[..., 3] += bias
    queries[..., 9] /= bias
    keys, values = rounded(keys, "bf16"), rounded(values, "bf16")
    # Nothing is cold: only the rounding of rotated tokens to 16 bits is left. A bias costs each of 64 channels an eighth of its
    # rounding, which is 2^-9 of it.
    exact = ReferenceCache(
        AttentionShape(1, 4, 1, 64), TOKENS, "fp32", Recipe.parse(f"k={keys_in},v=int8,rotate=kv,window=512")
    )
    exact.prefill(keys, values, np.array([TOKENS]))
    full = attend(queries[0], keys[0, 0], values[0, 0]).output
    slack = 2.0**-8 * max(bias, 4)
    assert np.abs(exact.decode(queries)[0][0] - full).max() < slack
    held = exact.read(0, TOKENS)
    for rows, given in zip(held, (keys, values), strict=True):
        assert np.abs(rows - given).max() < slack
    if keys_in != "fp8":  # which shares a scale among all tokens of a page
        levels = {"int8": 127, "int8_per_channel": 255, "int4": 15}[keys_in]
        assert error(f"k={keys_in},v=int8,rotate=k", keys, values, queries) < 12 * max(bias, 4) / levels


def test_rotated_values_lose_less_where_a_few_channels_are_large():
    (keys, values), queries = tokens()
    values[..., [3, 40]] *= 30
    for plain in ("int8", "k=int8,v=int4", "int4"):
        assert error(f"{plain},rotate=v", keys, values, queries) < error(plain, keys, values, queries) / 1.5


def test_rotated_keys_lose_less_per_token_where_a_few_channels_are_large_and_more_per_channel():
    (keys, values), queries = tokens()
    keys[..., [3, 40]] *= 30
    queries[..., [3, 40]] /= 30
    assert error("k=int8,v=bf16,rotate=k", keys, values, queries) < error("k=int8,v=bf16", keys, values, queries) / 1.5
    assert error("k=int4,v=bf16,rotate=k", keys, values, queries) > 2 * error("k=int4,v=bf16", keys, values, queries)


def test_a_saved_state_is_not_rotated_again():
    (keys, values), queries = tokens()
    recipe = Recipe.parse("int4,rotate=kv,pages=1/2,window=32")
    first, second = (ReferenceCache(AttentionShape(1, 4, 1, 64), TOKENS, "bf16", recipe) for _ in range(2))
    first.prefill(keys, values, np.array([TOKENS]))
    second.load_state(first.state())
    for mine, theirs in zip(first.read(0, TOKENS), second.read(0, TOKENS), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(first.decode(queries)[0], second.decode(queries)[0])
