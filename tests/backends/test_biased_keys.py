"""Keys with a bias in a rotary channel: what each format of 8 bits loses, and that kernels add nothing to it.

A bias that is added before the rotary embedding turns with the position: in a fast channel it takes both signs within a page,
in a slow one it is nearly constant there.
"""

from functools import cache
from math import sqrt

import numpy as np
import pytest

from elastickv.errors import NonFiniteError
from elastickv.kvcache import Oracle
from elastickv.kvcache.attention import attend
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.kvcache.rounding import rounded
from elastickv.recipe import AttentionShape, Recipe
from tests.helpers.kinds import opened
from tests.helpers.reference_backend import ReferenceBackend

DIM, TOKENS, BASE = 64, 640, 1e6
FAST, SLOW = 0, DIM // 2 - 2  # channels that turn by 1 and by 1e-6 of a radian a token
BIASES = (1.0, 10.0, 100.0, 1e3, 1e4)
PER_CHANNEL, PER_TOKEN = "k=int8_per_channel,v=bf16", "k=int8,v=bf16"
SHAPE = AttentionShape(1, 4, 1, DIM)


def turned(rows, positions):
    """Return rows with the rotary embedding of their positions: channel i turns with channel i + DIM / 2."""
    half = DIM // 2
    angles = positions[:, None] * BASE ** (-np.arange(half) / half)
    first, second = rows[..., :half], rows[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


@cache
def inputs(bias, channel):
    """Return (1, 1, tokens, dim) keys and values as a bf16 model has them, and queries (1, 4, dim).

    A query has little of the biased channel, as it has in a model that works: or that channel alone would decide.
    """
    rng = np.random.default_rng(int(bias) + channel)
    keys, values = rng.standard_normal((2, TOKENS, DIM))
    keys[:, channel] += bias
    queries = 2 * rng.standard_normal((4, 1, DIM))
    queries[..., [channel, channel + DIM // 2]] /= bias
    keys = rounded(turned(keys, np.arange(TOKENS)), "bf16")
    queries = turned(queries, np.array([TOKENS]))[:, 0].astype(np.float32)
    return keys[None, None], rounded(values, "bf16")[None, None], queries[None]


def cache_of(backend, text, bias, channel):
    """Return a cache without exact tokens that holds all keys and values."""
    keys, values, _ = inputs(bias, channel)
    filled = backend.cache(SHAPE, TOKENS, "bf16", Recipe.parse(f"{text},sinks=0,window=0"))
    filled.prefill(keys, values, np.array([TOKENS]))
    return filled


def error(text, bias, channel):
    """Return the relative L2 error of the output against attention to the keys as the model has them."""
    keys, values, queries = inputs(bias, channel)
    output = cache_of(ReferenceBackend(), text, bias, channel).decode(queries)[0]
    return relative_l2(output[0], attend(queries[0], keys[0, 0], values[0, 0]).output).max()


@pytest.mark.parametrize("bias", BIASES)
def test_the_bias_of_a_slow_channel_costs_keys_per_channel_nothing(bias):
    assert error(PER_CHANNEL, bias, SLOW) < 0.02
    if bias >= 100:
        assert error(PER_TOKEN, bias, SLOW) > 10 * error(PER_CHANNEL, bias, SLOW)
        assert error("k=fp8,v=bf16", bias, SLOW) > 3 * error(PER_CHANNEL, bias, SLOW)


def test_a_bias_of_a_thousand_makes_keys_per_token_useless():
    assert error(PER_TOKEN, 1e3, SLOW) > 0.5 and error(PER_TOKEN, 1e3, FAST) > 0.5


@pytest.mark.parametrize("bias", BIASES)
def test_a_fast_channel_loses_its_own_precision_and_leaves_the_others_theirs(bias):
    keys, _, _ = inputs(bias, FAST)
    stored = cache_of(ReferenceBackend(), PER_CHANNEL, bias, FAST).stored(0, 0).cold_keys
    off = np.abs(stored - keys[0, 0]).max(axis=0)
    biased = [FAST, FAST + DIM // 2]
    others = np.delete(np.arange(DIM), biased)
    assert off[others].max() < 6 / 255
    # Half a step of its range, of which 16-bit scales add at most 2^-10.
    assert off[biased].max() <= (2 * bias + 12) / 510 * (1 + 2.0**-10)
    assert error(PER_CHANNEL, bias, FAST) < error(PER_TOKEN, bias, FAST) / (1.2 if bias < 100 else 10)


@pytest.fixture(scope="module", params=["cpu", *(pytest.param(k, marks=pytest.mark.gpu) for k in ("cuda", "cuda simt"))])
def backend(request):
    return opened(request.param, request).backend


@pytest.mark.parametrize("bias", [*BIASES, 3e4])
@pytest.mark.parametrize("channel", [FAST, SLOW])
@pytest.mark.parametrize("values", ["bf16", "int8", "int4"])
def test_kernels_read_biased_keys_as_the_oracle_does(backend, bias, channel, values):
    cache = cache_of(backend, f"k=int8_per_channel,v={values}", bias, channel)
    _, _, queries = inputs(bias, channel)
    for scale in (1, 8):
        output, lse = cache.decode(scale * queries)
        expected, expected_lse = Oracle(cache).decode(scale * queries)
        assert relative_l2(output, expected).max() < 4e-3
        assert np.abs(lse - expected_lse).max() < 1e-2


@pytest.mark.parametrize("text", ["k=int8_per_channel,v=int8,pages=1/4", "k=int8_per_channel,v=bf16,pages=1/2,anchor_every=2"])
@pytest.mark.parametrize("channel", [FAST, SLOW])
def test_pages_are_chosen_by_the_range_of_their_channels(backend, text, channel):
    ours, reference = (cache_of(each, text, 1e3, channel) for each in (backend, ReferenceBackend()))
    _, _, queries = inputs(1e3, channel)
    outputs = [each.decode(queries)[0] for each in (ours, reference)]
    np.testing.assert_array_equal(ours.pages_read(0, 0), reference.pages_read(0, 0))
    assert relative_l2(*outputs).max() < 4e-3


def test_a_query_that_has_much_of_the_biased_channel_is_as_exact_as_float32_is(backend):
    """Scores of thousands that differ by little: the bias is added once a page, and codes are of the range alone."""
    _, _, queries = inputs(1e4, SLOW)
    queries = queries.copy()
    queries[..., SLOW] = 1
    cache = cache_of(backend, "k=int8_per_channel,v=bf16", 1e4, SLOW)
    (output, lse), (expected, expected_lse) = cache.decode(queries), Oracle(cache).decode(queries)
    size = np.abs(expected_lse).max()
    assert size > 1000
    assert np.abs(lse - expected_lse).max() < size * 2.0**-18  # of some units in the last place of float32
    assert relative_l2(output, expected).max() < 1e-2


def test_keys_up_to_the_range_of_half_precision_are_kept_and_larger_ones_reported(backend):
    keys, values, queries = inputs(1.0, SLOW)
    keys = keys.copy()
    keys[0, 0, 40, 5], keys[0, 0, 41, 5] = 65280, -65280  # the largest bfloat16 below 65504
    recipe = Recipe.parse("k=int8_per_channel,v=int8,sinks=0,window=0")
    cache = backend.cache(SHAPE, TOKENS, "bf16", recipe)
    cache.prefill(keys, values, np.array([TOKENS]))
    cache.raise_non_finite()
    stored = cache.stored(0, 0).cold_keys
    assert stored[40, 5] == pytest.approx(65280, rel=2e-3) and stored[41, 5] == -65280
    queries = queries / sqrt(DIM)
    assert np.isfinite(cache.decode(queries)[0]).all()
    keys[0, 0, 40, 5] = 70144
    cache.prefill(keys, values, np.array([TOKENS]))
    with pytest.raises(NonFiniteError, match="position 40"):
        cache.raise_non_finite()
