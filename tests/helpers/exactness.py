"""Attention over what a cache says it holds, from the definition, and how far a kernel's arithmetic may be from it.

A kernel rounds the operands of its products and sums in float32. With u the relative error of an operand, a score is off by at
most tau = u sqrt(head_dim) max|q| max|k|, a weight then by a factor of exp(2 tau), and an output by what that and u leave of
the sum of |weight x value|. Values in integers share one unit for the weights of a page: that adds what the greatest weigh.
"""

from dataclasses import dataclass

import numpy as np

from elastickv.kvcache import LayerCache
from elastickv.recipe import PAGE_TOKENS

FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOOR = 2.0**-126  # beneath the least normal float32 nothing is promised


@dataclass(frozen=True)
class Expected:
    """One KV head's outputs and log-sum-exps in float64, what they may be off by, and the hull that outputs lie in."""

    output: np.ndarray
    lse: np.ndarray
    output_slack: np.ndarray
    lse_slack: np.ndarray
    low: np.ndarray
    high: np.ndarray
    finite: bool


def attention(cache: LayerCache, row: int, head: int, queries: np.ndarray, u: float) -> Expected:
    """Return attention of (group, head_dim) `queries` over the tokens that the last decode, at an anchor, has read."""
    stored, recipe = cache.stored(row, head), cache.recipe
    pages = cache.pages_read(row, head)
    cold = np.arange(len(stored.cold_keys))
    if pages is not None:
        cold = (pages[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)).ravel()
    keys = np.concatenate([stored.cold_keys[cold], stored.exact_keys])
    values = np.concatenate([stored.cold_values[cold], stored.exact_values])
    mass = np.zeros(len(keys))
    if recipe.selection == "stride" and len(cold):
        mass[: len(cold)] = np.log((int(cache.lengths[row]) - len(stored.exact_keys)) / len(cold))
    q = queries.astype(np.float64)
    scores = q @ keys.T / np.sqrt(q.shape[1]) + mass
    top = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=1, keepdims=True)
    weights /= total
    tau = u * (np.sqrt(q.shape[1]) * np.abs(q).max(axis=1) * np.abs(keys).max() + np.abs(mass).max() + np.log(len(keys)))
    sizes = np.abs(values)
    loudest = weights * sizes.max(axis=1)
    short = -len(keys) % PAGE_TOKENS
    peaks = np.pad(loudest, ((0, 0), (0, short))).reshape(len(q), -1, PAGE_TOKENS).max(axis=2).sum(axis=1)
    slack = np.expm1(np.minimum(2 * tau, 50))[:, None] * (weights @ sizes) + u * (weights @ sizes + 32 * peaks[:, None])
    return Expected(
        weights @ values,
        (top + np.log(total))[:, 0],
        slack + FLOOR,
        tau + u,
        values.min(axis=0) - u * sizes.max(),
        values.max(axis=0) + u * sizes.max(),
        bool(sizes.sum(axis=0).max() < FLOAT32_MAX / 4 and (np.abs(q) @ np.abs(keys).T).max() < FLOAT32_MAX / 64),
    )


def check(cache: LayerCache, queries: np.ndarray, outputs: np.ndarray, lse: np.ndarray, u: float) -> None:
    """Fail unless every head's outputs are within what arithmetic of rounding `u` allows, and finite where they can be."""
    group = cache.shape.group
    for row, head in np.ndindex(cache.shape.batch, cache.shape.kv_heads):
        heads = slice(head * group, (head + 1) * group)
        expected = attention(cache, row, head, queries[row, heads], u)
        got, mass = outputs[row, heads].astype(np.float64), lse[row, heads].astype(np.float64)
        where = f"sequence {row}, KV head {head}, {cache.lengths[row]} tokens, {cache.recipe}"
        if not expected.finite:
            wrong = np.isfinite(got) & (np.abs(got - expected.output) > expected.output_slack)
            assert not wrong.any(), f"finite and wrong: {where}"
            continue
        assert np.isfinite(got).all() and np.isfinite(mass).all(), f"not finite: {where}"
        off = np.abs(got - expected.output) / expected.output_slack
        assert off.max() <= 1, f"{off.max():.3g} times what rounding allows: {where}"
        assert (got >= expected.low - FLOOR).all() and (got <= expected.high + FLOOR).all(), f"outside of all values: {where}"
        assert (np.abs(mass - expected.lse) <= expected.lse_slack).all(), f"log-sum-exp: {where}"
