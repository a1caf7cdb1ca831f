"""Pages are ranked by what their scales say of their keys."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from elastickv.kvcache.quantize import quantize_int4_keys, stored_values
from elastickv.kvcache.scorers import select_pages
from elastickv.kvcache.scorers.bounds import page_bounds, score_pages
from tests.helpers.cases import tried

DIM = 16
pages = hnp.arrays(np.float32, (3, 32, DIM), elements=st.floats(-1000, 1000, width=32))
queries = hnp.arrays(np.float32, (4, DIM), elements=st.floats(-100, 100, width=32))


def scores_of(keys, q):
    """(queries, pages, tokens) of the keys as stored."""
    stored = stored_values(keys.reshape(-1, DIM), "int4", False, DIM).reshape(keys.shape)
    return np.einsum("qd,ptd->qpt", q.astype(np.float64), stored) / np.sqrt(DIM), stored


@given(pages, queries)
@tried(60)
def test_no_stored_key_is_above_the_bound_over_the_whole_range(keys, q):
    _, scales, zeros = quantize_int4_keys(keys)
    scores, _ = scores_of(keys, q)
    bounds = page_bounds(q, scales, zeros, span=1)
    assert (scores.max(axis=2) <= bounds + 1e-9 * np.abs(bounds) + 1e-9).all()


@given(pages, queries)
@tried(60)
def test_the_bound_over_the_whole_range_is_reached_by_a_key_of_the_best_ends(keys, q):
    _, scales, zeros = (np.asarray(a, np.float64) for a in quantize_int4_keys(keys))
    best = np.where(q[:, None] > 0, zeros + 15 * scales, zeros)
    np.testing.assert_allclose(
        page_bounds(q, scales, zeros, span=1), np.einsum("qd,qpd->qp", q.astype(np.float64), best) / np.sqrt(DIM), atol=1e-6
    )


@given(pages, queries, st.floats(0, 1))
@tried(60)
def test_a_narrower_span_bounds_less_and_never_less_than_the_middle(keys, q, span):
    _, scales, zeros = quantize_int4_keys(keys)
    middle, narrow, whole = (page_bounds(q, scales, zeros, span=x) for x in (0, span, 1))
    slack = 1e-9 * np.abs(whole) + 1e-9
    assert (middle <= narrow + slack).all() and (narrow <= whole + slack).all()


def test_a_page_is_scored_by_itself_and_each_head_adds_its_own():
    rng = np.random.default_rng(0)
    q, scales, zeros = rng.standard_normal((4, DIM)), rng.random((9, DIM)), rng.standard_normal((9, DIM))
    together = score_pages(page_bounds(q, scales, zeros))
    heads = [score_pages(page_bounds(head[None], scales, zeros)) for head in q]
    np.testing.assert_allclose(together, np.sum(heads, axis=0))
    np.testing.assert_allclose(score_pages(page_bounds(q, scales[3:5], zeros[3:5])), together[3:5])


def test_no_pages_have_no_scores():
    assert score_pages(page_bounds(np.ones((4, DIM)), np.zeros((0, DIM)), np.zeros((0, DIM)))).shape == (0,)


@pytest.mark.parametrize(("count", "expected"), [(0, []), (1, [1]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])])
def test_the_best_pages_are_named_in_order_and_of_equals_the_first(count, expected):
    np.testing.assert_array_equal(select_pages(np.array([-1.0, 5.0, 2.0, 2.0, 2.0]), count), expected)
