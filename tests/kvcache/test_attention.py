"""The oracle is softmax attention, and splitting it changes nothing."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from elastickv.backends.feedback import Feedback, OrthogonalMap
from elastickv.kvcache.attention import attend, merge
from elastickv.kvcache.error_metrics import relative_l2, summarize
from tests.helpers.cases import tried


def draw(seed, tokens, dim=16, queries=3, scale=1.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((queries, dim)) * scale, rng.standard_normal((tokens, dim)), rng.standard_normal((tokens, dim))


def test_attention_is_the_softmax_average():
    q, k, v = draw(0, 50)
    weights = np.exp(q @ k.T / 4)
    partial = attend(q, k, v)
    np.testing.assert_allclose(partial.output, weights @ v / weights.sum(1, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(partial.lse, np.log(weights.sum(1)), rtol=1e-12)


@given(st.integers(0, 99), st.lists(st.integers(0, 40), min_size=1, max_size=5), st.floats(0.01, 100))
def test_merging_any_split_gives_the_whole(seed, cuts, scale):
    q, k, v = draw(seed, 40, scale=scale)
    edges = [0, *sorted(cuts), 40]
    parts = [attend(q, k[a:b], v[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    whole, merged = attend(q, k, v), merge(*parts)
    np.testing.assert_allclose(merged.output, whole.output, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(merged.lse, whole.lse, rtol=1e-12)


def test_no_keys_weigh_nothing():
    q, k, v = draw(1, 8)
    nothing = attend(q, k[:0], v[:0])
    assert np.isneginf(nothing.lse).all()
    np.testing.assert_array_equal(merge(nothing, attend(q, k, v)).output, attend(q, k, v).output)
    assert np.isneginf(merge(nothing, nothing).lse).all()


def test_an_error_that_is_not_finite_is_infinite():
    assert relative_l2([[np.nan, 1.0]], [[1.0, 1.0]])[0] == np.inf
    assert relative_l2([[0.0, 0.0]], [[0.0, 0.0]])[0] == 0
    assert relative_l2([[1.0, 0.0]], [[0.0, 0.0]])[0] == np.inf
    assert summarize([1.0, 3.0]).mean == 2


@given(st.sampled_from([64, 80, 128]), st.integers(0, 1000))
@tried(20)
def test_the_feedback_maps_are_orthogonal(dim, seed):
    matrix = OrthogonalMap.seeded(dim, seed)(np.eye(dim, dtype=np.float32))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=1e-5)


def test_feedback_has_the_magnitudes_asked_for_whatever_the_output():
    outputs = np.random.default_rng(0).standard_normal((2, 6, 64)).astype(np.float32) * 1e-3
    q, k, v = Feedback.seeded(64, 0, 1.5, 2.5, 0.5)(outputs, group=3)
    assert q.shape == (2, 6, 64)
    assert k.shape == v.shape == (2, 2, 64)
    for mapped, rms in ((q, 1.5), (k, 2.5), (v, 0.5)):
        np.testing.assert_allclose(np.sqrt((mapped**2).mean(-1)), rms, rtol=1e-4)
