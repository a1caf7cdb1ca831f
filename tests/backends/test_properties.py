"""Every recipe on every backend against attention in float64, from poisoned memory: any shape, length and numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.kvcache import Oracle, ReferenceCache
from elastickv.kvcache.attention import attend
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.recipe import PAGE_TOKENS, AttentionShape, Recipe, regions
from tests.helpers.cases import NUMBERS, Case, cases, tried
from tests.helpers.exactness import check


def same_storage(cache, other):
    """Both hold the same, to the bit."""
    np.testing.assert_array_equal(cache.lengths, other.lengths)
    for row, head in np.ndindex(cache.shape.batch, cache.shape.kv_heads):
        ours, theirs = cache.stored(row, head), other.stored(row, head)
        for name in ("cold_keys", "cold_values", "exact_keys", "exact_values"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=f"{name} of {row}, {head}")


@tried(40)
@given(data=st.data())
def test_any_recipe_on_any_shape_decodes_like_the_oracle_while_it_grows(each, data):
    case = data.draw(cases(each, rotations=True))
    cache, queries = each.filled(case, room=6)
    oracle = Oracle(cache)
    for step in range(7):
        outputs, lse = each.decode(cache, 2 * queries)
        expected, expected_lse = oracle.decode(2 * queries)
        assert relative_l2(outputs, expected).max() < each.limit(case)
        off = 4 * max(each.limit(case), 2e-5) if each.name.startswith("cuda") else each.limit(case)
        # Large scores are float32, too: a few units in the last place of what 256 products add up to.
        np.testing.assert_allclose(lse, expected_lse, rtol=2e-6, atol=off)
        if step < 6:
            keys, values, queries = case.token(step)
            cache.append(keys, values)
    cache.raise_non_finite()


@tried(80)
@given(data=st.data())
def test_numbers_of_any_size_are_within_what_rounding_allows(each, data):
    case = data.draw(cases(each, numbers=tuple(NUMBERS), longest=300))
    cache, queries = each.filled(case)
    outputs, lse = each.decode(cache, queries)
    cache.raise_non_finite()
    check(cache, queries, outputs, lse, each.operand_rounding(case))


@tried(40)
@given(data=st.data())
def test_what_is_stored_is_what_the_reference_stores(each, data):
    case = data.draw(cases(each, numbers=tuple(NUMBERS), longest=300))
    cache, _ = each.filled(case, room=40)
    twin = ReferenceCache(case.shape, cache.capacity, case.dtype, case.recipe, case.anchor_offset)
    keys, values, _ = case.prompt()
    twin.prefill(keys, values, np.array(case.lengths))
    for step in range(data.draw(st.integers(0, 40))):
        keys, values, _ = case.token(step)
        for one in (cache, twin):
            one.append(keys, values)
    same_storage(cache, twin)


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("text", ["dense", "int8", "fp8,window=0", "int4,window=32", "k=int8,v=int4", "int4,pages=1/2,sinks=0"])
def test_a_single_token_is_returned(each, text, numbers):
    """The softmax over one token is 1: its value comes back as it was stored."""
    for dtype in ("bf16", "fp16", "fp32"):
        case = Case(AttentionShape(2, 4, 2, 64), Recipe.parse(text), dtype, (1, 1), seed=3, numbers=numbers)
        cache, queries = each.filled(case)
        outputs, _ = each.decode(cache, queries)
        stored = np.stack([[cache.stored(row, head).exact_values[0] for head in range(2)] for row in range(2)])
        np.testing.assert_allclose(outputs, np.repeat(stored, 2, axis=1), rtol=2.0**-20, atol=2.0**-126)


def a_million(each, text):
    """Return a cache of 2^20 random tokens and one that was appended."""
    if each.name == "reference":
        pytest.skip("derives a million stored tokens anew for every question")
    cache = each.backend.cache(AttentionShape(1, 4, 1, 64), (1 << 20) + 1, "bf16", Recipe.parse(text))
    cache.fill_random(np.array([1 << 20]), seed=3)
    cache.append(*np.random.default_rng(0).standard_normal((2, 1, 1, 64), dtype=np.float32))
    cache.raise_non_finite()
    return cache


def attend_to(cache, queries, spans):
    """Return attention in float64 over some spans of tokens, as they read back."""
    read = [[array[0, 0] for array in cache.read(*span)] for span in spans]
    return attend(queries, *(np.concatenate(arrays) for arrays in zip(*read, strict=True)))


@pytest.mark.parametrize("text", ["dense", "k=int8,v=fp8"])
def test_every_one_of_a_million_tokens_is_read_and_counted(each, text):
    """Three queries that one token each outweighs all others for, and one to which all are alike."""
    cache = a_million(each, text)
    positions = [5, (1 << 19) + 7, (1 << 20) - 200]
    queries = np.zeros((1, 4, 64), np.float32)
    queries[0, :3] = [16 * cache.read(place, place + 1)[0][0, 0, 0] for place in positions]
    outputs, lse = each.decode(cache, queries)
    expected = attend_to(cache, queries[0, :3], [(place, place + 1) for place in positions])
    assert relative_l2(outputs[0, :3], expected.output).max() < 4e-3
    np.testing.assert_allclose(lse[0, :3], expected.lse, rtol=4e-3)
    assert lse[0, 3] == pytest.approx(np.log((1 << 20) + 1), abs=1e-4)
    # The mean of so many normal numbers: six standard errors.
    assert np.abs(outputs[0, 3]).max() < 6 / (1 << 10)


def test_the_pages_read_of_a_million_tokens_are_what_the_output_is_of(each):
    cache = a_million(each, "int4,pages=1/128")
    queries = np.random.default_rng(1).standard_normal((1, 4, 64), dtype=np.float32)
    outputs, lse = each.decode(cache, queries)
    pages, split = cache.pages_read(0, 0), regions((1 << 20) + 1, cache.recipe.sinks, cache.recipe.window)
    assert len(pages) == split.cold // PAGE_TOKENS // 128
    starts = split.sinks + PAGE_TOKENS * pages
    exact = [(0, split.sinks), (split.sinks + split.cold, (1 << 20) + 1)]
    expected = attend_to(cache, queries[0], [*exact, *((first, first + PAGE_TOKENS) for first in starts.tolist())])
    assert relative_l2(outputs[0], expected.output).max() < 4e-3
    np.testing.assert_allclose(lse[0], expected.lse, atol=4e-3)
