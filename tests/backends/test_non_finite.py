"""A NaN or an infinity that was given is told with its place, wherever it lies and whoever reads it; none is made."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.errors import NonFiniteError
from elastickv.recipe import AttentionShape, Recipe
from tests.helpers.cases import DTYPES, LARGEST, Case, cases, tried
from tests.helpers.exactness import check

BAD = (np.nan, np.inf, -np.inf)


@tried(40)
@given(data=st.data())
def test_any_bad_value_is_reported_with_its_position_however_it_was_stored(each, data):
    """In K or in V, in a prompt, a chunk or a step; also where `stride` drops the token or no page is read."""
    case = data.draw(cases(each, longest=300))
    keys, values, queries = case.prompt()
    lengths = np.array(case.lengths)
    row, head = data.draw(st.integers(0, case.shape.batch - 1)), data.draw(st.integers(0, case.shape.kv_heads - 1))
    position = data.draw(st.integers(0, int(lengths[row]) - 1))
    spoilt = data.draw(st.sampled_from([keys, values]))
    too_large = [1e6] if case.exact == "fp16" else []
    spoilt[row, head, position, data.draw(st.integers(0, case.shape.head_dim - 1))] = data.draw(
        st.sampled_from([*BAD, *too_large])
    )
    cache = each.new(case)
    split = data.draw(st.integers(0, int(lengths.min())))
    how = data.draw(st.sampled_from(["prompt", "chunk", "steps"]))
    if how == "prompt":
        cache.prefill(keys, values, lengths)
    elif how == "chunk":
        cache.prefill(keys, values, np.full_like(lengths, split))
        cache.extend(keys[:, :, split:], values[:, :, split:], lengths - split)
    else:
        cache.prefill(keys, values, lengths - split)
        for token in range(split):
            at, rows = lengths - split + token, np.arange(len(lengths))
            cache.append(keys[rows, :, at], values[rows, :, at])
    if how != "steps":
        each.decode(cache, queries)
    with pytest.raises(NonFiniteError, match=f"sequence {row}, KV head {head}, position {position}$"):
        cache.raise_non_finite()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("spoils", ["keys", "values"])
def test_a_bad_value_in_a_page_that_no_step_reads_is_reported(each, bad, spoils):
    """The page's own keys score so low that it is never selected: the output stays finite, and the place is told."""
    case = Case(AttentionShape(2, 4, 2, 64), Recipe.parse("int4,pages=1/8,anchor_every=2"), "bf16", (600, 600))
    keys, values, queries = case.prompt()
    queries = np.abs(queries)
    page = slice(4 + 3 * 32, 4 + 4 * 32)
    keys[1, 0, page] = -5
    (keys if spoils == "keys" else values)[1, 0, page.start + 9, 3] = bad
    cache = each.new(case, room=4)
    cache.prefill(keys, values, np.array(case.lengths))
    for step in range(4):
        outputs, _ = each.decode(cache, queries)
        if spoils == "values":
            assert 3 not in cache.pages_read(1, 0)
            assert np.isfinite(outputs).all()
        with pytest.raises(NonFiniteError, match=f"sequence 1, KV head 0, position {page.start + 9}"):
            cache.raise_non_finite()
        cache.append(*case.token(step)[:2])


@pytest.mark.parametrize("text", ["dense", "bf16,window=40", "int8", "fp8", "int4", "int8,stride=3", "int4,pages=1/2"])
@pytest.mark.parametrize("back", ["prompt", "crop", "rewind"])
def test_what_is_taken_back_leaves_nothing_bad_behind(each, text, back):
    """The bad values still lie in memory, behind the end: they must neither be told nor weigh, not even 0 x NaN."""
    for dtype in ("bf16", "fp16", "fp32"):
        case = Case(AttentionShape(1, 2, 1, 64), Recipe.parse(text), dtype, (203,))
        keys, values, queries = case.prompt()
        bad = np.full((2, 1, 1, 64), np.nan, np.float32)
        cache = each.new(case, room=200)
        if back == "prompt":
            cache.prefill(*np.full((2, 1, 1, 400, 64), np.nan, np.float32), np.array([400]))
        cache.prefill(keys, values, np.array([203]))
        if back != "prompt":
            cache.mark()
            cache.append(*bad)
            with pytest.raises(NonFiniteError, match="position 203"):
                cache.raise_non_finite()
            cache.crop(np.array([203])) if back == "crop" else cache.rewind()
        cache.raise_non_finite()
        clean, _ = each.filled(case, room=200)
        for got, expected in zip(each.decode(cache, queries), each.decode(clean, queries), strict=True):
            np.testing.assert_allclose(got, expected, rtol=each.rounding(case))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("text", ["dense", "int8", "fp8", "int4", "k=bf16,v=int4", "int4,pages=1/2", "int8,stride=2"])
def test_a_query_that_is_not_finite_leaves_no_finite_output_and_harms_no_other(each, text, bad):
    case = Case(AttentionShape(1, 4, 2, 64), Recipe.parse(text), "bf16", (400,))
    cache, queries = each.filled(case)
    expected, _ = each.decode(cache, queries)
    queries[0, 1, 5] = bad
    outputs, _ = each.decode(cache, queries)
    assert not np.isfinite(outputs[0, 1]).any()
    if "pages" not in text:  # a group reads the same pages, which its scores decide
        np.testing.assert_allclose(outputs[0, 0], expected[0, 0], rtol=each.rounding(case), atol=1e-5)
    np.testing.assert_allclose(outputs[0, 2:], expected[0, 2:], rtol=each.rounding(case), atol=1e-5)


@pytest.mark.parametrize("text", ["int4", "k=int4,v=fp8,pages=1/4", "k=int4,v=bf16,window=0"])
def test_a_key_beyond_the_range_of_int4_is_reported_once_it_is_quantized(each, text):
    case = Case(AttentionShape(2, 2, 2, 64), Recipe.parse(text), "bf16", (300, 300))
    keys, values, _ = case.prompt()
    keys[1, 1, 43, 9], keys[0, 0, 2, 1] = -70000, 70000  # the second is a sink, which is kept as it is
    cache = each.new(case)
    cache.prefill(keys, values, np.array(case.lengths))
    with pytest.raises(NonFiniteError, match="sequence 1, KV head 1, position 43; int4 keys hold magnitudes up to 65504"):
        cache.raise_non_finite()


@tried(30)
@given(data=st.data())
def test_nothing_finite_becomes_bad_but_for_an_output_beyond_float32(each, data):
    """Values next to the largest of their dtype: outputs are right, or not finite, and never finite and wrong."""
    case = data.draw(cases(each, longest=200, selections=("dense", "all", "stride", "pages")))
    if data.draw(st.booleans()):
        # Or next to all lies in the window.
        near = {"sinks": case.recipe.sinks % 8, "window": data.draw(st.sampled_from([0, 1, 32]))}
        case = replace(case, recipe=replace(case.recipe, **near)) if not case.recipe.is_dense else case
    keys, values, queries = case.prompt()
    values *= (
        np.float32(LARGEST[case.exact]) / np.abs(values).max() * np.float32(data.draw(st.sampled_from([0.999, 0.1, 1e-3])))
    )
    cache = each.new(case)
    cache.prefill(keys, values, np.array(case.lengths))
    cache.raise_non_finite()
    outputs, lse = each.decode(cache, queries)
    check(cache, queries, outputs, lse, each.operand_rounding(case))


@pytest.mark.parametrize("tokens", [32, 200])
@pytest.mark.parametrize("text", ["int8", "int4", "fp8", "k=int4,v=int8", "k=int8,v=int4", "k=int4,v=bf16", "int4,pages=1"])
def test_large_values_are_attended_to_where_they_were_quantised(each, text, tokens):
    """Whatever a kernel multiplies codes with on the way, finite outputs are finite."""
    recipe = Recipe.parse(f"{text},sinks=0,window=0")
    for dtype in DTYPES:
        case = Case(AttentionShape(1, 2, 1, 64), recipe, dtype, (tokens,))
        keys, values, queries = case.prompt()
        largest = np.float32(LARGEST[case.exact]) / np.abs(values).max()
        for share in (0.999, 0.1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-9):
            cache = each.new(case)
            cache.prefill(keys, values * largest * np.float32(share), np.array([tokens]))
            cache.raise_non_finite()
            outputs, lse = each.decode(cache, queries)
            check(cache, queries, outputs, lse, each.operand_rounding(case))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("spoils", ["keys", "values"])
@pytest.mark.parametrize("text", ["int8", "fp8", "int4", "k=int4,v=int8", "int4,pages=1/2"])
def test_a_crop_leaves_nothing_of_a_bad_value_in_its_page_or_tells(each, text, spoils, bad):
    """A page's tokens may share a scale: those before a bad one come back as its codes say."""
    case = Case(AttentionShape(1, 2, 1, 64), Recipe.parse(f"{text},window=32"), "bf16", (300,))
    keys, values, queries = case.prompt()
    clean = each.new(case)
    clean.prefill(keys, values, np.array([300]))
    (keys if spoils == "keys" else values)[0, 0, 4 + 32 + 20, 3] = bad
    cache = each.new(case)
    cache.prefill(keys, values, np.array([300]))
    for one in (cache, clean):
        one.crop(np.array([4 + 32 + 15]))
    outputs, _ = each.decode(cache, queries)
    if np.isfinite(outputs).all():
        cache.raise_non_finite()
        # A page without the bad value has a range of its own: no more than rounding of the format.
        np.testing.assert_allclose(outputs, each.decode(clean, queries)[0], atol=0.1)
    else:
        with pytest.raises(NonFiniteError, match="sequence 0, KV head 0, position"):
            cache.raise_non_finite()


def test_a_bad_value_is_reported_when_one_in_another_row_was_rolled_back(each):
    case = Case(AttentionShape(2, 2, 2, 64), Recipe.parse("int4,pages=1/2,window=32"), "bf16", (300, 300))
    keys, values, _ = case.prompt()
    values[0, 0, 290, 3] = values[1, 1, 40, 3] = np.nan
    cache = each.new(case)
    cache.prefill(keys, values, np.array(case.lengths))
    with pytest.raises(NonFiniteError, match=r"sequence 0, KV head 0, position 290$"):
        cache.raise_non_finite()
    cache.crop(np.array([280, 300]))
    with pytest.raises(NonFiniteError, match=r"sequence 1, KV head 1, position 40$"):
        cache.raise_non_finite()
    cache.reorder(np.array([1, 0]))
    with pytest.raises(NonFiniteError, match=r"sequence 0, KV head 1, position 40$"):
        cache.raise_non_finite()
    cache.gather(np.array([1, 1]), 300).raise_non_finite()


@pytest.mark.parametrize("text", ["int8", "fp8", "int4", "k=int8,v=int4"])
def test_the_largest_numbers_come_back_from_codes_as_numbers(each, text):
    """Scales are rounded up: what codes stand for may lie beyond the largest half, which is no reason for an infinity."""
    case = Case(AttentionShape(1, 1, 1, 64), Recipe.parse(f"{text},window=64"), "fp16", (300,))
    keys, values, queries = case.prompt()
    keys, values = (np.where(array < 0, -65504, 65504).astype(np.float32) for array in (keys, values))
    cache = each.new(case)
    cache.prefill(keys, values, np.array([300]))
    cache.crop(np.array([150]))
    cache.raise_non_finite()
    assert np.isfinite(cache.stored(0, 0).exact_keys).all() and np.isfinite(cache.stored(0, 0).exact_values).all()
    assert np.isfinite(each.decode(cache, queries * np.float32(1e-6))[0]).all()
