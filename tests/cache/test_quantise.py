"""Quantised rows: bounded error, no clamping, no overflow."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from elastickv.cache.bits import from_bf16_bits, rounded, to_bf16_bits
from elastickv.cache.quantise import dequantise_int8, quantise_int8

finite_rows = hnp.arrays(np.float32, (3, 64), elements=st.floats(-(2.0**127), 2.0**127, width=32))


@given(finite_rows)
def test_int8_is_within_half_a_step_and_uses_its_range(rows):
    codes, scales = quantise_int8(rows)
    step = from_bf16_bits(scales).astype(np.float64)[:, None]
    assert np.abs(codes.astype(int)).max() <= 127
    # A scale below the least normal float32 divides inexactly; it is then less than one step of float32 itself.
    error = np.abs(dequantise_int8(codes, scales) - rows)
    assert (error <= 0.5001 * step + 1e-44).all()


def test_a_row_of_zeros_stays_zero():
    codes, scales = quantise_int8(np.zeros((1, 64), np.float32))
    assert not codes.any()
    assert not scales.any()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bf16_rounds_to_nearest_even(value):
    x = np.float32(value)
    down = from_bf16_bits((x.view(np.uint32) >> 16).astype(np.uint16))
    got = from_bf16_bits(to_bf16_bits(x))
    if not np.isfinite(got):
        assert abs(value) > 3.38e38
        return
    up = from_bf16_bits((x.view(np.uint32) >> 16).astype(np.uint16) + np.uint16(1))
    nearest = min((down, up), key=lambda c: (abs(np.float64(c) - np.float64(x)), int(c.view(np.uint32) >> 16) & 1))
    assert got == nearest


def test_nan_stays_nan():
    assert np.isnan(rounded([np.nan], "bf16")).all()
    assert np.isnan(rounded([np.nan], "fp16")).all()
