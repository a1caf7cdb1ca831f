"""What must not change an attention: another order of heads, rows or tokens, another split of the work, another unit."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.backends.cpu import threads
from elastickv.kvcache.attention import attend
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.kvcache.rounding import rounded
from elastickv.recipe import AttentionShape, Recipe, for_ratio
from tests.backends.test_properties import same_storage
from tests.helpers.cases import Case, cases, tried


def near(each, case, got, expected):
    """Return whether two results agree: to the bit where the backend promises it, else to its rounding."""
    if each.repeats:
        np.testing.assert_array_equal(got, expected)
    else:
        np.testing.assert_allclose(got, expected, rtol=each.rounding(case), atol=each.rounding(case))


def decoded(each, case, keys, values, queries, recipe=None, room=0):
    cache = each.new(case, room, recipe)
    cache.prefill(keys, values, np.array(case.lengths))
    return each.decode(cache, queries)


@tried(20)
@given(data=st.data())
def test_another_order_of_rows_and_heads_is_that_order_of_the_outputs(each, data):
    case = data.draw(cases(each, longest=300))
    keys, values, queries = case.prompt()
    rows, heads = (data.draw(st.permutations(range(n))) for n in (case.shape.batch, case.shape.kv_heads))
    members = data.draw(st.permutations(range(case.shape.group)))
    query_heads = [head * case.shape.group + member for head in heads for member in members]
    recipe = case.recipe
    if len(recipe.fractions) > 1:
        recipe = replace(recipe, fractions=tuple(recipe.fractions[head] for head in heads))
    moved = replace(case, lengths=tuple(case.lengths[row] for row in rows))
    outputs, lse = decoded(each, case, keys, values, queries)
    again = decoded(each, moved, *(a[rows][:, heads] for a in (keys, values)), queries[rows][:, query_heads], recipe)
    # Scores of pages add up a group's queries in their order: with another, two pages that score alike may change places.
    if recipe.selection != "pages" or members == sorted(members):
        near(each, case, again[0], outputs[rows][:, query_heads])
        near(each, case, again[1], lse[rows][:, query_heads])


@tried(20)
@given(data=st.data())
def test_another_split_of_the_context_changes_nothing_but_rounding(each, data):
    case = data.draw(cases(each, selections=("dense", "all", "stride", "pages")))
    keys, values, queries = case.prompt()
    outputs, lse = decoded(each, case, keys, values, queries)
    number = data.draw(st.sampled_from([1, 2, 3, 5, 16, 64]))
    if each.name.startswith("cuda"):
        cache, _ = each.filled(case)
        if cache.variant.splits:
            return  # a fixed split has as many blocks as it was built for: test_cuda_device tries several
        cache.blocks = min(number, cache.blocks)
        cache._choose()
        again = each.decode(cache, queries)
    else:
        with mock.patch.object(threads, "count", return_value=number):
            again = decoded(each, case, keys, values, queries)
    assert relative_l2(again[0], outputs).max() < 10 * each.rounding(case)
    np.testing.assert_allclose(again[1], lse, atol=10 * each.rounding(case))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_result_on_the_same_cache(number):
    """Threads take work by ticket: which of them does what must leave no trace, not even in rounding."""
    import numba

    from tests.helpers.kinds import opened

    each = opened("cpu", None)
    for text in ("dense", "int4,pages=1/2", "k=int8,v=int4"):
        case = Case(AttentionShape(2, 8, 2, 128), Recipe.parse(text), "bf16", (1500, 900))
        cache, queries = each.filled(case)
        outputs, lse = each.decode(cache, queries)
        with mock.patch.object(threads, "MIN_PARALLEL_ELEMENTS", 1 if number > 1 else 1 << 40):
            numba.set_num_threads(min(number, numba.config.NUMBA_NUM_THREADS))
            try:
                for _ in range(5):
                    again = each.decode(cache, queries)
                    np.testing.assert_array_equal(again[0], outputs)
                    np.testing.assert_array_equal(again[1], lse)
            finally:
                numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


@tried(25)
@given(data=st.data())
def test_one_by_one_in_blocks_or_as_a_prompt_stores_and_gives_the_same(each, data):
    """The tokens of every sequence come in as a prompt, in chunks cut anywhere, and one by one."""
    case = data.draw(cases(each, longest=260, numbers=("normal", "mixed")))
    keys, values, queries = case.prompt()
    lengths = np.array(case.lengths)
    together, chunked, single = each.new(case), each.new(case), each.new(case)
    together.prefill(keys, values, lengths)
    cuts = sorted(data.draw(st.lists(st.integers(0, int(lengths.max())), max_size=4)))
    chunked.prefill(keys, values, np.minimum(lengths, 0))
    for first, last in zip([0, *cuts], [*cuts, int(lengths.max())], strict=True):
        chunked.extend(keys[:, :, first:last], values[:, :, first:last], np.clip(lengths - first, 0, last - first))
    # Rows of a step grow together: the shortest is whole from its start, the others begin with a prompt.
    alone = int(lengths.min())
    single.prefill(keys, values, lengths - alone)
    for token in range(alone):
        at = lengths - alone + token
        rows = np.arange(len(at))
        single.append(keys[rows, :, at], values[rows, :, at])
    outputs, lse = each.decode(together, queries)
    for other in (chunked, single):
        same_storage(together, other)
        other.crop(lengths)  # the next decode is an anchor, as one after a prompt is
        again = each.decode(other, queries)
        near(each, case, again[0], outputs)
        near(each, case, again[1], lse)


@tried(15)
@given(data=st.data())
def test_a_ratio_of_one_is_attention_over_the_input(each, data):
    case = data.draw(cases(each, selections=("dense",), numbers=("normal", "mixed", "one-hot")))
    recipe = for_ratio(1, max(case.lengths), case.shape, case.dtype)
    assert recipe.is_dense
    keys, values, queries = case.prompt()
    outputs, _ = decoded(each, case, keys, values, queries, recipe)
    stored_keys, stored_values = (rounded(array, case.dtype) for array in (keys, values))
    group = case.shape.group
    for row, head in np.ndindex(case.shape.batch, case.shape.kv_heads):
        heads, length = slice(head * group, (head + 1) * group), case.lengths[row]
        expected = attend(queries[row, heads], stored_keys[row, head, :length], stored_values[row, head, :length])
        assert relative_l2(outputs[row, heads], expected.output).max() < (
            1e-2 if case.numbers == "one-hot" else each.limit(case)
        )


@tried(20)
@given(data=st.data())
def test_values_in_another_unit_give_outputs_in_that_unit(each, data):
    """A power of two on V passes through codes, scales and sums without a trace."""
    case = data.draw(cases(each, dtypes=("bf16", "fp32")))
    if case.exact == "fp16":
        case = replace(case, recipe=Recipe.parse("bf16"), anchor_offset=0)
    keys, values, queries = case.prompt()
    factor = np.float32(2.0) ** data.draw(st.integers(-40, 40))
    outputs, lse = decoded(each, case, keys, values, queries)
    scaled, same = decoded(each, case, keys, values * factor, queries)
    near(each, case, scaled / factor, outputs)
    near(each, case, same, lse)


@tried(20)
@given(data=st.data())
def test_keys_in_another_unit_with_queries_in_its_inverse_score_alike(each, data):
    case = data.draw(cases(each, dtypes=("bf16", "fp32")))
    if case.exact == "fp16":
        case = replace(case, recipe=Recipe.parse("bf16"), anchor_offset=0)
    keys, values, queries = case.prompt()
    factor = np.float32(2.0) ** data.draw(st.integers(-2, 8))  # scales of int4 keys are halves, and must stay normal
    outputs, lse = decoded(each, case, keys, values, queries)
    again = decoded(each, case, keys * factor, values, queries / factor)
    # A scale below the least normal half has fewer digits.
    if factor >= 1 or case.recipe.key_format != "int4":
        near(each, case, again[0], outputs)
        near(each, case, again[1], lse)


@tried(20)
@given(data=st.data())
def test_what_is_added_to_all_keys_moves_the_log_sum_exp_and_nothing_else(each, data):
    """With keys kept exactly: multiples of 1/16 up to 8 are exact in every dtype, sums of them too."""
    case = data.draw(cases(each, selections=("dense",)))
    _, values, queries = case.prompt()
    rng = np.random.default_rng(case.seed)
    queries = rounded(queries, "bf16") / 4
    keys = (rng.integers(-64, 64, values.shape) / 16).astype(np.float32)
    moved = (rng.integers(-64, 64, (*values.shape[:2], 1, values.shape[3])) / 16).astype(np.float32)
    outputs, lse = decoded(each, case, keys, values, queries)
    again, shifted = decoded(each, case, keys + moved, values, queries)
    query_heads = queries.reshape(*moved.shape[:2], case.shape.group, -1).astype(np.float64)
    by = np.einsum("bhgd,bhd->bhg", query_heads, moved[:, :, 0])
    limit = 4 * each.limit(case)
    assert relative_l2(again, outputs).max() < limit
    np.testing.assert_allclose(shifted, lse + by.reshape(lse.shape) / np.sqrt(case.shape.head_dim), atol=limit, rtol=limit)


@tried(20)
@given(data=st.data())
def test_another_order_of_the_tokens_changes_nothing_but_rounding(each, data):
    case = data.draw(cases(each, selections=("dense",)))
    case = replace(case, lengths=(max(case.lengths),) * case.shape.batch)
    keys, values, queries = case.prompt()
    order = np.random.default_rng(case.seed).permutation(case.lengths[0])
    outputs, lse = decoded(each, case, keys, values, queries)
    again = decoded(each, case, keys[:, :, order], values[:, :, order], queries)
    assert relative_l2(again[0], outputs).max() < each.limit(case)
    np.testing.assert_allclose(again[1], lse, atol=each.limit(case))
