"""Rounding by Hessians: the optimum by formula, its cost beside that of the nearest codes, and the text of a Hessian."""

import numpy as np
import pytest

from elastickv.errors import UsageError
from elastickv.kvcache import ReferenceCache
from elastickv.kvcache.gptq import (
    DAMPING,
    Compensation,
    gptq_codes,
    hessian_of,
    hessian_text,
    layer_compensation,
    transformed,
)
from elastickv.kvcache.hadamard import rotated
from elastickv.kvcache.quantize import CODECS, stored_values
from elastickv.recipe import AttentionShape, Recipe
from elastickv.recipe.calibration import StorageStatistics

DIM, TOKENS = 64, 64
BIASES = (1.0, 10.0, 100.0, 1e3, 1e4)
FORMATS = [
    ("int8", False, DIM), ("int8_per_channel", False, DIM), ("int4", False, DIM), ("int3", False, DIM),
    ("int2", False, DIM), ("int2", True, 32),
    ("int8", True, DIM), ("int4", True, 32), ("int3", True, DIM),
]  # fmt: skip


def correlated(seed, dim=DIM, spread=1.0):
    """Return the second moments of rows whose channels depend on each other, and differ in size."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((dim, dim)) @ rng.standard_normal((dim, dim)) * np.exp(spread * rng.standard_normal(dim))
    return mixed.T @ mixed / dim


def rows_of(seed, bias=0.0, tokens=TOKENS, dim=DIM):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((tokens, dim)).astype(np.float32)
    rows[:, 5] += np.float32(bias)
    return rows


def of_head(hessian):
    chosen = Compensation.of(hessian[None])
    return chosen.order[0], chosen.shares[0]


def cost(rows, hessian, fmt, value, group, by_hessians):
    errors = stored_values(rows, fmt, value, group, of_head(hessian) if by_hessians else None) - rows
    return float(((errors @ hessian) * errors).sum(-1).mean())


def optimal_codes(rows, scales, zeros, levels, hessian):
    """Fix the code of one channel after the other, and move those that follow to where the whole error costs least."""
    damped = hessian + DAMPING * np.diag(hessian).mean() * np.eye(len(hessian))
    order = np.argsort(-np.diag(hessian), kind="stable")
    target, codes = rows.astype(np.float64), np.zeros(rows.shape)
    for j, channel in enumerate(order):
        done, rest = order[: j + 1], order[j + 1 :]
        position = (target[:, channel] - zeros[channel]) / scales[channel]
        codes[:, channel] = np.rint(np.clip(position, 0, levels))
        if len(rest):
            errors = codes[:, done] * scales[done] + zeros[done] - rows[:, done]
            moved = -errors @ damped[np.ix_(done, rest)] @ np.linalg.inv(damped[np.ix_(rest, rest)])
            target[:, rest] = rows[:, rest] + moved
    return codes


def test_every_channel_makes_good_what_those_before_it_left_over():
    rows, hessian = rows_of(0), correlated(1)
    scales, zeros = np.linspace(0.2, 0.4, DIM, dtype=np.float32), np.linspace(-3, -2, DIM, dtype=np.float32)
    codes = gptq_codes(rows, scales, zeros, 0, 15, *of_head(hessian))
    assert np.mean(codes == optimal_codes(rows, scales, zeros, 15, hessian)) > 0.999  # float32 decides a tie


@pytest.mark.parametrize(("fmt", "value", "group"), FORMATS)
def test_it_costs_less_than_the_nearest_codes_where_channels_are_correlated(fmt, value, group):
    rows, hessian = rows_of(2), correlated(3)
    by_hessians, nearest = (cost(rows, hessian, fmt, value, group, chosen) for chosen in (True, False))
    assert by_hessians < 0.7 * nearest


@pytest.mark.parametrize("fmt", ["int4", "int8_per_channel"])
@pytest.mark.parametrize("bias", BIASES)
def test_so_it_does_with_a_bias_in_a_channel_that_has_its_own_scale(fmt, bias):
    rows, hessian = rows_of(2, bias), correlated(3)
    by_hessians, nearest = (cost(rows, hessian, fmt, False, DIM, chosen) for chosen in (True, False))
    assert by_hessians < 0.7 * nearest


@pytest.mark.parametrize(("fmt", "value", "group"), FORMATS)
def test_it_costs_hardly_more_than_the_nearest_codes_where_there_is_little_to_gain(fmt, value, group):
    rng = np.random.default_rng(4)
    queries = rng.standard_normal((4096, DIM))
    hessian = queries.T @ queries / len(queries)
    by_hessians, nearest = (cost(rows_of(5), hessian, fmt, value, group, chosen) for chosen in (True, False))
    assert by_hessians < 1.01 * nearest


@pytest.mark.parametrize(("fmt", "value", "group"), FORMATS)
def test_with_independent_channels_codes_are_the_nearest(fmt, value, group):
    rows, hessian = rows_of(6, 100.0), np.diag(np.arange(1.0, DIM + 1))
    plain = stored_values(rows, fmt, value, group)
    np.testing.assert_array_equal(stored_values(rows, fmt, value, group, of_head(hessian)), plain)


def test_what_is_on_the_grid_stays_there():
    rows = stored_values(rows_of(7, 30.0), "int4", False, DIM).astype(np.float32)
    _, scales, zeros = CODECS["int4"].quantize_keys(rows.reshape(-1, 32, DIM))
    scales, zeros = (np.repeat(each.astype(np.float32), 32, axis=0) for each in (scales, zeros))
    codes = gptq_codes(rows, scales, zeros, 0, 15, *of_head(correlated(8)))
    np.testing.assert_allclose(codes * scales + zeros, rows, rtol=0, atol=1e-5)


def test_channels_that_cost_most_come_first_and_answer_for_none():
    hessian = correlated(9)
    order, shares = of_head(hessian)
    assert (np.diff(np.diag(hessian)[order]) <= 0).all()
    assert not np.triu(shares).any() and np.tril(shares, -1).any()


def test_the_hessian_of_what_is_stored_is_that_of_its_queries():
    """Keys are smoothed, then rotated: the queries that they meet are divided, then rotated."""
    rng = np.random.default_rng(10)
    queries = rng.standard_normal((512, DIM)) @ np.linalg.cholesky(correlated(11)).T
    smoothing = tuple(int(n) for n in rng.integers(-3, 4, DIM))
    stored = rotated(queries * np.exp2(-np.array(smoothing)))
    of_model = queries.T @ queries
    np.testing.assert_allclose(transformed(of_model[None], True, (smoothing,))[0], stored.T @ stored, rtol=1e-9, atol=1e-6)
    plain = rotated(queries)
    np.testing.assert_allclose(transformed(of_model[None], True)[0], plain.T @ plain, rtol=1e-9, atol=1e-6)
    np.testing.assert_array_equal(transformed(of_model[None], False)[0], of_model)


@pytest.mark.parametrize("dim", [1, 2, 64, 96, 256])
def test_a_hessian_as_text_moves_by_less_than_the_damping(dim):
    hessian = correlated(12, dim, spread=2.0)
    read = hessian_of(hessian_text(hessian), dim)
    assert np.linalg.norm(read - hessian, 2) < DAMPING * np.diag(hessian).mean()
    np.testing.assert_allclose(np.diag(read), np.diag(hessian), rtol=1e-6)
    assert len(hessian_text(hessian)) <= 4 * (dim * (dim + 3) // 3 + 1)


def test_channels_that_a_hessian_lacks_are_zeros():
    hessian = correlated(13, 48)
    padded = hessian_of(hessian_text(hessian), 64)
    assert not padded[48:].any() and not padded[:, 48:].any() and padded[47, 47] > 0
    order, shares = of_head(padded)
    assert set(order[48:].tolist()) == set(range(48, 64))
    assert np.isfinite(shares).all() and not shares[48:].any()


def test_a_hessian_that_no_queries_can_have_is_refused():
    with pytest.raises(UsageError, match="not positive: run `elastickv calibrate` again"):
        Compensation.of(-np.eye(4)[None])


def test_a_cache_without_hessians_refuses_a_recipe_that_needs_them():
    recipe, shape = Recipe.parse("int4,rounding=gptq"), AttentionShape(1, 2, 1, DIM)
    refusal = (
        r"^int4,rounding=gptq needs a calibration with Hessians: run `elastickv calibrate` and give its file, or leave out rou"
    )
    with pytest.raises(UsageError, match=refusal):
        ReferenceCache(shape, 64, "bf16", recipe)
    with pytest.raises(UsageError, match=refusal):
        layer_compensation(recipe, DIM, StorageStatistics(((0,) * DIM,)))
    assert layer_compensation(Recipe.parse("int4"), DIM, StorageStatistics()) is None
