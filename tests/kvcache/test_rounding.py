"""Conversions against another implementation, number by number: PyTorch's bfloat16, float16 and float8 e4m3."""

import warnings

import numpy as np
import pytest

from elastickv.kvcache import quantize
from elastickv.kvcache.quantize import E4M3_VALUES, quantize_fp8
from elastickv.kvcache.rounding import from_bf16_bits, rounded, to_bf16_bits

torch = pytest.importorskip("torch")

# Every bfloat16, and float32 numbers on, next to and between them: ties above all.
EDGES = (
    np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
).ravel()
FLOATS = EDGES.view(np.float32)
FINITE = FLOATS[np.isfinite(FLOATS)]


def same_numbers(got, expected):
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(got[number], expected[number])
    np.testing.assert_array_equal(np.signbit(got[number]), np.signbit(expected[number]))


def test_bfloat16_is_rounded_as_pytorch_rounds_it():
    bits = to_bf16_bits(FLOATS)
    assert bits.dtype == np.uint16
    same_numbers(from_bf16_bits(bits), torch.from_numpy(FLOATS.copy()).to(torch.bfloat16).float().numpy())
    assert set(bits[np.isnan(FLOATS)].tolist()) == {0x7FC0}


@pytest.mark.parametrize(("dtype", "other"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_rounding_to_a_dtype_is_pytorchs_too(dtype, other):
    got = rounded(FINITE, dtype)
    assert got.dtype == np.float32
    same_numbers(got, torch.from_numpy(FINITE.copy()).to(other).float().numpy())
    assert rounded([1, 2.5], dtype).dtype == np.float32


def test_what_a_half_cannot_hold_is_infinite_without_a_warning():
    with warnings.catch_warnings(), np.errstate(over="warn"):
        warnings.simplefilter("error")
        assert rounded([1e6, -1e6, 65504], "fp16").tolist() == [np.inf, -np.inf, 65504]


def test_e4m3_numbers_are_pytorchs():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    same_numbers(E4M3_VALUES, every)
    same_numbers(quantize._e4m3_values(), every)


def test_e4m3_codes_are_pytorchs_for_every_half():
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.abs(halves) <= 448]
    page = np.zeros((-(-len(halves) // 32), 32, 1), np.float32)
    page.reshape(-1)[: len(halves)] = halves
    # One page of one scale: its largest is 448, so the scale is one.
    codes, scales = quantize_fp8(page.reshape(1, -1, 1))
    assert from_bf16_bits(scales)[0] == 1
    expected = torch.from_numpy(halves).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(codes.reshape(-1)[: len(halves)], expected)
    assert codes.dtype == np.uint8 and scales.dtype == np.uint16
