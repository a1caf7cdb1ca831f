"""Every published format against its formula, written out for single numbers in NumPy."""

import math

import numpy as np
import pytest
import torch

from elastickv.evaluation.kv_formats.gguf_blocks import Q4_0, Q4_0_ROTATED, Q8_0, Q8_0_ROTATED
from elastickv.evaluation.kv_formats.kivi import KIVI2, KIVI4
from elastickv.evaluation.kv_formats.kvarn import KVARN_K4V2, KVARN_K4V4_PLAIN, variance_scales
from elastickv.evaluation.kv_formats.microscaling import MXFP4, NVFP4
from elastickv.evaluation.kv_formats.per_channel_floats import FP8_PER_CHANNEL, FP8_PER_CHANNEL_CENTERED
from elastickv.evaluation.kv_formats.per_token_head import (
    FP8_PER_TENSOR,
    FP8_PER_TOKEN_HEAD,
    INT4_PER_TOKEN_HEAD,
    INT4_PER_TOKEN_HEAD_UNROTATED,
    INT8_PER_TOKEN_HEAD,
)
from elastickv.evaluation.kv_formats.published_formats import PUBLISHED
from elastickv.evaluation.kv_formats.rotations import gaussian, random_rotation, random_signs
from elastickv.evaluation.kv_formats.turboquant import TURBOQUANT3, TURBOQUANT3_QJL
from elastickv.evaluation.kv_formats.turboquant_presets import TURBOQUANT_3BIT_NC, TURBOQUANT_K8V4

DIM = 64
# Magnitudes by their codes: exponent bits, then mantissa bits; the last code of e4m3 is NaN.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array([(m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)][:-1])


@pytest.fixture(scope="module")
def rows():
    """(tokens, head_dim) with channels of different means and spreads, one token of zeros."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, DIM)) * rng.uniform(0.2, 3, DIM) + rng.normal(0, 2, DIM)
    x[7] = 0
    return x.astype(np.float32)


def read_back(plane, x):
    return plane.round_trip(torch.from_numpy(x)[None, None]).numpy()[0, 0]


def away(x):
    return math.copysign(math.floor(abs(x) + 0.5), x)


def half(x):
    return float(np.float16(x))


def to_float(x, magnitudes):
    """The nearest of the magnitudes, with the sign of x; of two, the one with an even code."""
    errors = abs(magnitudes - min(abs(x), magnitudes[-1]))
    nearest = np.flatnonzero(errors == errors.min())
    return math.copysign(magnitudes[next((i for i in nearest if i % 2 == 0), nearest[0])], x)


def e4m3(x):
    return to_float(x, E4M3)


def e2m1(x):
    return to_float(x, E2M1)


def sylvester(size):
    """Entry (i, j) is (-1)^(bits that i and j share) / sqrt(size)."""
    return np.array([[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]) / math.sqrt(size)


def by_blocks(row, size, quantize):
    return np.concatenate([quantize(block.astype(np.float64)) for block in row.reshape(-1, size)])


def int8_head(row):
    scale = max(abs(row).max() / 127, 1e-6)
    return np.array([np.clip(away(x / scale), -128, 127) * scale for x in row])


def fp8_head(row):
    scale = max(abs(row).max() / 448, 1e-6)
    return np.array([e4m3(x / scale) * scale for x in row])


def int4_head(row):
    scale = max((row.max() - row.min()) / 15, 1e-6)
    zero = np.clip(away(-row.min() / scale), 0, 15)
    return np.array([(np.clip(away(x / scale + zero), 0, 15) - zero) * scale for x in row])


def q8_0(block):
    scale = abs(block).max() / 127
    return np.array([away(x / scale) * half(scale) if scale else 0 for x in block])


def q4_0(block):
    scale = block[abs(block).argmax()] / -8
    return np.array([(min(15, int(x / scale + 8.5)) - 8) * half(scale) if scale else 0 for x in block])


def uniform(group, bits):
    low, scale = group.min(), (group.max() - group.min()) / (2**bits - 1)
    codes = [np.clip(np.rint((x - low) / scale), 0, 2**bits - 1) if scale else 0 for x in group]
    return np.array(codes) * half(scale) + half(low)


def nvfp4(block):
    scale = e4m3(abs(block).max() / 6)
    return np.array([e2m1(x / scale) * scale if scale else 0 for x in block])


def mxfp4(block):
    largest = abs(block).max()
    scale = 2.0 ** (math.floor(math.log2(largest)) - 2) if largest else 1
    return np.array([e2m1(x / scale) * scale for x in block])


def same(mine, formula, share=0.995):
    """Most numbers agree to float32; where a number is halfway between two codes, float32 may choose the other."""
    assert np.isclose(mine, formula, rtol=2e-5, atol=2e-5).mean() >= share


@pytest.mark.parametrize(
    ("plane", "size", "formula"),
    [
        (FP8_PER_TENSOR.keys, DIM, lambda row: np.array([e4m3(x) for x in row])),
        (FP8_PER_TOKEN_HEAD.keys, DIM, fp8_head),
        (INT8_PER_TOKEN_HEAD.values, DIM, int8_head),
        (INT4_PER_TOKEN_HEAD_UNROTATED.keys, DIM, int4_head),
        (Q8_0.keys, 32, q8_0),
        (Q4_0.values, 32, q4_0),
        (KIVI2.values, 32, lambda group: uniform(group, 2)),
        (KIVI4.values, 32, lambda group: uniform(group, 4)),
        (KVARN_K4V4_PLAIN.values, DIM, lambda group: uniform(group, 4)),
        (TURBOQUANT_3BIT_NC.values, DIM, lambda group: uniform(group, 3)),
        (TURBOQUANT_K8V4.keys, DIM, lambda row: np.array([e4m3(x) for x in row])),
        (NVFP4.keys, 16, nvfp4),
        (MXFP4.values, 32, mxfp4),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_token_is_rounded_in_its_groups_of_channels(rows, plane, size, formula):
    same(read_back(plane, rows), np.stack([by_blocks(row, size, formula) for row in rows]))


def fp8_channel(page, middle=0.0):
    scale = half(abs(page - middle).max() / 448)
    return np.array([e4m3((x - middle) / scale) * scale if scale else 0 for x in page]) + middle


@pytest.mark.parametrize(
    ("plane", "middle"),
    [
        (FP8_PER_CHANNEL.keys, lambda page: 0.0),
        (FP8_PER_CHANNEL_CENTERED.keys, lambda page: half((page.min() + page.max()) / 2)),
    ],
    ids=["scaled", "centered"],
)
def test_fp8_keys_per_channel_share_a_scale_over_a_page(rows, plane, middle):
    def quantize(page):
        return fp8_channel(page, middle(page))

    same(read_back(plane, rows), np.stack([by_blocks(channel, 32, quantize) for channel in rows.T], axis=1))


@pytest.mark.parametrize(("plane", "tokens"), [(KIVI2.keys, 32), (KIVI4.keys, 32), (KVARN_K4V4_PLAIN.keys, 128)])
def test_keys_are_grouped_per_channel_over_tokens(rows, plane, tokens):
    bits = 2 if plane is KIVI2.keys else 4
    by_channel = np.stack([by_blocks(channel, tokens, lambda group: uniform(group, bits)) for channel in rows.T], axis=1)
    same(read_back(plane, rows), by_channel)


@pytest.mark.parametrize(
    ("rotated", "size", "plain"),
    [(Q8_0_ROTATED.keys, 64, q8_0), (Q4_0_ROTATED.keys, 64, q4_0), (Q4_0_ROTATED.values, 64, q4_0)],
)
def test_rotated_blocks_are_rounded_in_the_hadamard_basis(rows, rotated, size, plain):
    matrix = sylvester(size)
    expected = np.stack([by_blocks(row @ matrix, 32, plain) @ matrix for row in rows])
    same(read_back(rotated, rows), expected, 0.97)


def test_llama_cpp_rotates_whole_heads_of_k_and_64_channels_of_v():
    x = np.random.default_rng(1).standard_normal((4, 128)).astype(np.float32)
    whole, blocks = sylvester(128), np.kron(np.eye(2), sylvester(64))
    same(read_back(Q4_0_ROTATED.keys, x), np.stack([by_blocks(row @ whole, 32, q4_0) @ whole for row in x]), 0.97)
    same(read_back(Q4_0_ROTATED.values, x), np.stack([by_blocks(row @ blocks, 32, q4_0) @ blocks for row in x]), 0.97)


def test_vllm_rotates_the_largest_power_of_two_with_random_signs():
    x = np.random.default_rng(2).standard_normal((4, 96)).astype(np.float32)
    signs = np.tile(random_signs(32).numpy().astype(np.float64), 3)
    blocks = np.kron(np.eye(3), sylvester(32))
    expected = np.stack([int4_head((row * signs) @ blocks) @ blocks * signs for row in x])
    same(read_back(INT4_PER_TOKEN_HEAD.values, x), expected, 0.97)


def nearest(row, codebook):
    return np.array([codebook[abs(codebook - x).argmin()] for x in row])


def test_turboquant_rounds_a_unit_vectors_rotation_to_the_codebook(rows):
    rotation = random_rotation(DIM).numpy().astype(np.float64)
    # Max 1960, table I, 8 levels.
    codebook = np.array([-2.152, -1.344, -0.7560, -0.2451, 0.2451, 0.7560, 1.344, 2.152]) / math.sqrt(DIM)
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    units = rows / np.maximum(norms, 1e-9)[:, None]
    expected = np.stack([half(n) * nearest(rotation @ unit, codebook) @ rotation for n, unit in zip(norms, units, strict=True)])
    # A coordinate between two centroids may take the other one, which moves all channels of its token.
    assert np.isclose(read_back(TURBOQUANT3.values, rows), expected, rtol=2e-3, atol=2e-3).all(axis=1).mean() > 0.98


def test_vllms_turboquant_normalizes_the_rotated_centroids_again(rows):
    rotation = sylvester(DIM)
    codebook = np.array([-2.152, -1.344, -0.7560, -0.2451, 0.2451, 0.7560, 1.344, 2.152])
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    rounded = np.stack(
        [nearest(rotation @ row * math.sqrt(DIM) / (n + 1e-8), codebook) for n, row in zip(norms, rows, strict=True)]
    )
    expected = norms[:, None] * (rounded / np.linalg.norm(rounded, axis=1, keepdims=True)) @ rotation
    read = read_back(TURBOQUANT_3BIT_NC.keys, rows)
    assert np.isclose(read, expected, rtol=2e-3, atol=2e-3).all(axis=1).mean() > 0.95
    np.testing.assert_allclose(np.linalg.norm(read, axis=1), norms, rtol=1e-3)


def test_the_qjl_residual_adds_what_the_signs_of_a_projection_say(rows):
    rotation, projection = (m.numpy().astype(np.float64) for m in (random_rotation(DIM), gaussian(DIM, 1)))
    codebook = np.array([-1.510, -0.4528, 0.4528, 1.510]) / math.sqrt(DIM)
    unit = rows[3].astype(np.float64) / np.linalg.norm(rows[3])
    rounded = nearest(rotation @ unit, codebook) @ rotation
    rest = unit - rounded
    estimate = math.sqrt(math.pi / 2) / DIM * np.linalg.norm(rest) * projection.T @ np.sign(projection @ rest)
    expected = np.linalg.norm(rows[3]) * (rounded + estimate)
    np.testing.assert_allclose(read_back(TURBOQUANT3_QJL.keys, rows)[3], expected, rtol=5e-3, atol=5e-3)


def test_inner_products_with_the_qjl_residual_have_no_bias():
    """Algorithm 2 promises E<y, read back> = <y, x>; algorithm 1 shrinks what it stores."""
    x = np.random.default_rng(3).standard_normal((20000, DIM)).astype(np.float32)
    shrunk, unbiased = (
        float((read_back(plane, x) * x).sum() / (x * x).sum()) for plane in (TURBOQUANT3.keys, TURBOQUANT3_QJL.keys)
    )
    assert shrunk < 0.97 and abs(unbiased - 1) < 0.005


def test_variance_normalization_evens_deviations_out():
    rng = np.random.default_rng(4)
    tile = rng.standard_normal((DIM, 128)) * rng.uniform(1, 1.5, (DIM, 1)) * rng.uniform(1, 30, (1, 128))
    rows, columns = variance_scales(torch.from_numpy(tile))
    even = tile / rows.numpy() / columns.numpy()
    assert max(even.std(0).max() / even.std(0).min(), even.std(1).max() / even.std(1).min()) < 1.05


def test_kvarn_rounds_normalized_rotated_channels_and_tokens():
    x = (np.random.default_rng(5).standard_normal((128, DIM)) * np.linspace(0.5, 20, DIM)).astype(np.float32)
    rotated = x @ sylvester(DIM)
    for plane, tile, bits in ((KVARN_K4V2.keys, rotated.T, 4), (KVARN_K4V2.values, rotated, 2)):
        rows, columns = (scale.double().numpy() for scale in variance_scales(torch.from_numpy(tile.astype(np.float32))))
        even = tile / rows / columns
        low, scale = even.min(1, keepdims=True), np.ptp(even, axis=1, keepdims=True) / (2**bits - 1)
        codes = np.rint((even - low) / scale)
        read = (codes * np.float16(scale * rows) + np.float16(low * rows)) * np.float16(columns)
        read = read.T if plane is KVARN_K4V2.keys else read
        # A code that float32 rounds the other way moves all channels of its token a little.
        assert np.linalg.norm(read_back(plane, x) - read @ sylvester(DIM)) < 0.02 * np.linalg.norm(x)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("of_keys", [True, False])
def test_zeros_come_back_as_zeros_and_numbers_as_numbers(name, of_keys):
    plane = PUBLISHED[name].keys if of_keys else PUBLISHED[name].values
    zeros = torch.zeros(1, 2, 128, DIM)
    assert torch.equal(plane.round_trip(zeros), zeros)
    x = torch.randn(1, 2, 128, DIM, generator=torch.Generator().manual_seed(6)) / 4
    read = plane.round_trip(x)
    assert read.shape == x.shape and torch.isfinite(read).all() and (read - x).norm() < 0.8 * x.norm()
