"""Quantised rows and pages: bounded error, no clamping, no overflow, scales that round outwards."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from elastickv.kvcache.quantize import (
    E4M3_VALUES,
    dequantize_fp8,
    dequantize_int8,
    quantize_fp8,
    quantize_int2_keys,
    quantize_int2_values,
    quantize_int3_keys,
    quantize_int3_values,
    quantize_int4_keys,
    quantize_int4_values,
    quantize_int8,
    quantize_int8_keys_per_channel,
    stored_values,
)
from elastickv.kvcache.rounding import from_bf16_bits, rounded, to_bf16_bits

finite_rows = hnp.arrays(np.float32, (3, 64), elements=st.floats(-(2.0**127), 2.0**127, width=32))


@given(finite_rows)
def test_int8_is_within_half_a_step_and_uses_its_range(rows):
    codes, scales = quantize_int8(rows)
    step = from_bf16_bits(scales).astype(np.float64)[:, None]
    assert np.abs(codes.astype(int)).max() <= 127
    # A scale below the least normal float32 divides inexactly, and where 1 / 127 of the row underflows it reads as 0.
    error = np.abs(dequantize_int8(codes, scales) - rows)
    assert (error <= 0.5001 * step + 127 * 2.0**-149).all()


def test_a_row_of_zeros_stays_zero():
    codes, scales = quantize_int8(np.zeros((1, 64), np.float32))
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


def fp16_pages(limit=65504.0):
    return hnp.arrays(np.float32, (2, 32, 8), elements=st.floats(-limit, limit, width=16))


def bf16_rows(limit=2.0**126):
    return hnp.arrays(np.float32, (3, 64), elements=st.floats(-limit, limit, width=32)).map(lambda x: rounded(x, "bf16"))


PER_CHANNEL = pytest.mark.parametrize(
    ("quantize", "levels"),
    [(quantize_int4_keys, 15), (quantize_int3_keys, 7), (quantize_int2_keys, 3), (quantize_int8_keys_per_channel, 255)],
)


@PER_CHANNEL
@given(pages=fp16_pages())
def test_keys_lie_within_what_scale_and_zero_span_and_within_half_a_step(quantize, levels, pages):
    codes, scales, zeros = quantize(pages)
    assert scales.dtype == zeros.dtype == np.float16 and codes.max() <= levels
    low, step = zeros.astype(np.float64)[:, None], scales.astype(np.float64)[:, None]
    assert (low <= pages).all()
    # The range is a difference in float32: it may be short by half a unit of its last place.
    assert (pages <= low + levels * step * (1 + 2.0**-23)).all()
    error = np.abs(codes * step + low - pages)
    assert (error <= 0.5001 * step + 1e-7 * np.abs(pages)).all()


@PER_CHANNEL
@given(pages=fp16_pages())
def test_the_scales_of_keys_are_the_least_that_span_them(quantize, levels, pages):
    _, scales, zeros = quantize(pages)
    least, most = pages.min(axis=1), pages.max(axis=1)
    # fp16 inputs: their least value is its own zero.
    np.testing.assert_array_equal(zeros.astype(np.float32), least)
    wide = (most - least) / np.float32(levels)
    assert (scales.astype(np.float32) >= wide).all()
    assert (np.nextafter(scales, np.float16(-np.inf)).astype(np.float32)[scales > 0] < wide[scales > 0]).all()


GROUPED = pytest.mark.parametrize(
    ("quantize", "levels"), [(quantize_int4_values, 15), (quantize_int3_values, 7), (quantize_int2_values, 3)]
)


@GROUPED
@given(rows=bf16_rows(), group=st.sampled_from([32, 64]))
def test_values_are_within_half_a_step_of_their_group(quantize, levels, rows, group):
    codes, scale_bits, zero_bits = quantize(rows, group)
    assert codes.max() <= levels and scale_bits.shape == (3, 64 // group)
    low, step = (from_bf16_bits(bits).astype(np.float64)[..., None] for bits in (zero_bits, scale_bits))
    grouped = rows.reshape(3, -1, group).astype(np.float64)
    assert (low <= grouped).all() and (grouped <= low + levels * step * (1 + 1e-6)).all()
    error = np.abs(codes.reshape(grouped.shape) * step + low - grouped)
    # The code is chosen in float32, whose rounding of (x - zero) counts where the zero is large beside the step.
    assert (error <= 0.5001 * step + 2e-7 * (np.abs(grouped) + np.abs(low))).all()


@given(bf16_rows())
def test_a_smaller_group_never_has_a_larger_scale(rows):
    whole, parts = (from_bf16_bits(quantize_int4_values(rows, group)[1]) for group in (64, 32))
    # Its zero is at or above the whole's, but rounding the zero down can widen a part by one bfloat16 step of it.
    slack = np.abs(rows).max(axis=1, keepdims=True) * 2.0**-7 / 15
    assert (parts <= whole * (1 + 2.0**-7) + slack).all()


CONSTANT = [("int4", False, 64), ("int3", False, 64), ("int8_per_channel", False, 64), ("int4", True, 32), ("int3", True, 32)]
CONSTANT += [("int2", False, 64), ("int2", True, 32)]


@pytest.mark.parametrize("value", [0.0, 1.0, -3.140625, 2.0**-24, -65504.0, 65504.0])
def test_a_constant_page_is_kept_exactly(value):
    page = np.full((1, 32, 64), value, np.float32)
    for fmt, is_value, group in CONSTANT:
        stored = rounded(page, "fp16" if not is_value else "bf16")
        np.testing.assert_array_equal(stored_values(stored[0], fmt, is_value, group), stored[0])


def test_denormal_keys_keep_their_order_of_magnitude():
    page = np.zeros((1, 32, 8), np.float32)
    page[0, :, 0] = np.arange(32) * np.float32(2.0**-24)
    codes, scales, zeros = quantize_int4_keys(page)
    read = codes * scales.astype(np.float64)[:, None] + zeros.astype(np.float64)[:, None]
    assert scales[0, 0] == np.float16(3 * 2.0**-24)
    assert np.abs(read - page).max() <= 1.5 * 2.0**-24
    assert not read[..., 1:].any()


@PER_CHANNEL
def test_keys_over_the_range_of_fp16_are_not_turned_into_nan_codes(quantize, levels):
    page = np.zeros((1, 32, 8), np.float32)
    page[0, 0, 0], page[0, 1, 0] = -65504, 65504
    codes, scales, zeros = quantize(page)
    assert codes.max() == levels
    assert np.isfinite(scales).all() and np.isfinite(zeros).all()
    read = codes * scales.astype(np.float64)[:, None] + zeros.astype(np.float64)[:, None]
    assert np.abs(read - page).max() <= scales.max() / 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fmt", ["int4", "fp8", "int8"])
def test_a_value_that_is_not_finite_leaves_the_other_pages_alone(bad, fmt):
    rng = np.random.default_rng(0)
    rows = rounded(rng.standard_normal((64, 64)), "bf16")
    spoilt = rows.copy()
    spoilt[40, 3] = bad
    with np.errstate(invalid="ignore", over="ignore"):
        for value in (False, True):
            good = stored_values(rows, fmt, value, 32)
            np.testing.assert_array_equal(stored_values(spoilt, fmt, value, 32)[:32], good[:32])


fp8_values = st.floats(-(2.0**100), 2.0**100, width=32)


@given(hnp.arrays(np.float32, (2, 32, 8), elements=fp8_values))
def test_fp8_is_within_half_a_unit_in_the_last_place(pages):
    codes, scales = quantize_fp8(pages)
    scale = from_bf16_bits(scales).astype(np.float64)[:, None, None]
    read = dequantize_fp8(codes, scales)
    # Three bits of mantissa; below 2^-6 of the scale steps are 2^-9 of it. Where 1 / 448 of the page underflows it reads as 0.
    nothing = 448 * 2.0**-149
    assert (np.abs(read - pages) <= np.maximum(np.abs(pages) * 2.0**-4, scale * 2.0**-10) * (1 + 1e-6) + nothing).all()
    assert (np.abs(read) <= 448 * scale).all()


@given(hnp.arrays(np.float32, (2, 32, 8), elements=fp8_values))
def test_the_scale_of_fp8_is_the_least_power_of_two_that_holds_the_page(pages):
    _, bits = quantize_fp8(pages)
    for page, scale in zip(pages, from_bf16_bits(bits).astype(np.float64), strict=True):
        largest = float(np.abs(page).max())
        # Ratios in float32, as every backend computes them; below the least normal float32 the scale is the least normal.
        step = float(np.float32(largest) / np.float32(448))
        assert scale == 0 if step == 0 else np.log2(scale) == int(np.log2(scale))
        assert step <= scale
        assert scale <= 2.0**-126 or step > scale / 2


def test_fp8_codes_are_those_of_the_specification():
    # OCP OFP8: S.EEEE.MMM, bias 7; largest 448 = 0x7E, one 0x38, least normal 2^-6 = 0x08, least subnormal 2^-9 = 0x01.
    page = np.zeros((1, 32, 8), np.float32)
    page[0, 0] = [448, 1, 2.0**-6, 2.0**-9, -448, -1, 2.0**-10, 1.0625]
    codes, scales = quantize_fp8(page)
    assert from_bf16_bits(scales)[0] == 1
    # 2^-10 and 1.0625 are halfway between two numbers: to the even one.
    np.testing.assert_array_equal(codes[0, 0], [0x7E, 0x38, 0x08, 0x01, 0xFE, 0xB8, 0x00, 0x38])


def test_fp8_reads_back_every_number_it_has():
    every = np.arange(256, dtype=np.uint8)
    every = every[(every & 0x7F) != 0x7F]
    one = np.array([0x3F80], np.uint16)
    numbers = dequantize_fp8(every[None, None], one)[0, 0].astype(np.float32)
    page = np.zeros((1, 32, 8), np.float32)
    page.reshape(-1)[: len(numbers)] = numbers
    codes, scales = quantize_fp8(page)
    assert from_bf16_bits(scales)[0] == 1
    np.testing.assert_array_equal(codes.reshape(-1)[: len(numbers)], every)


@GROUPED
@given(rows=hnp.arrays(np.float32, (3, 64), elements=st.floats(-65504, 65504, width=16)), group=st.sampled_from([32, 64]))
def test_values_of_halves_have_a_zero_beneath_them(quantize, levels, rows, group):
    """A half has more digits than a bfloat16: here the zero is truly rounded."""
    codes, scale_bits, zero_bits = quantize(rows, group)
    low, step = (from_bf16_bits(bits).astype(np.float64)[..., None] for bits in (zero_bits, scale_bits))
    grouped = rows.reshape(3, -1, group).astype(np.float64)
    assert (low <= grouped).all() and (grouped <= low + levels * step * (1 + 1e-6)).all()
    # Rounded down by less than one unit in the last place: 2^-7 of itself at most.
    assert (grouped.min(axis=-1, keepdims=True) - low <= np.abs(low) * 2.0**-7).all()
    np.testing.assert_array_equal(codes.reshape(grouped.shape)[np.broadcast_to(step == 0, grouped.shape)], 0)


def quantized(rows, fmt):
    """Return codes and scales of (2, 32, 64) rows."""
    return {
        "int8": quantize_int8,
        "fp8": quantize_fp8,
        "int4 keys": quantize_int4_keys,
        "int4 values": lambda x: quantize_int4_values(x, 32),
        "int8_per_channel keys": quantize_int8_keys_per_channel,
        "int2 keys": quantize_int2_keys,
        "int2 values": lambda x: quantize_int2_values(x, 32),
        "int3 keys": quantize_int3_keys,
        "int3 values": lambda x: quantize_int3_values(x, 32),
    }[fmt](rows)


SHAPES = {"int8": [(2, 32)], "fp8": [(2,)], "int4 keys": [(2, 64)] * 2, "int4 values": [(2, 32, 2)] * 2}
SHAPES |= {"int8_per_channel keys": SHAPES["int4 keys"], "int3 keys": SHAPES["int4 keys"], "int3 values": SHAPES["int4 values"]}
SHAPES |= {"int2 keys": SHAPES["int4 keys"], "int2 values": SHAPES["int4 values"]}
TYPES = {"int8": "bH", "fp8": "BH", "int4 keys": "Bee", "int4 values": "BHH", "int8_per_channel keys": "Bee"}
TYPES |= {f"{fmt} {part}": TYPES[f"int4 {part}"] for fmt in ("int3", "int2") for part in ("keys", "values")}


@pytest.mark.parametrize("fmt", SHAPES)
def test_codes_and_scales_have_their_types_and_shapes_whatever_numbers_are_given(fmt):
    rows = np.random.default_rng(4).integers(-50, 50, (2, 32, 64)).astype(np.float32)
    arrays = quantized(rows, fmt)
    assert [array.shape for array in arrays] == [(2, 32, 64), *SHAPES[fmt]]
    assert [array.dtype.char for array in arrays] == list(TYPES[fmt])
    for same in (rows.astype(np.float64), rows.astype(np.int64), rows.tolist()):
        for array, expected in zip(quantized(same, fmt), arrays, strict=True):
            np.testing.assert_array_equal(array, expected)
    for array, expected in zip(quantized(rows[:1], fmt), arrays, strict=True):
        np.testing.assert_array_equal(array, expected[:1])


@pytest.mark.parametrize(
    ("fmt", "top"),
    [
        ("int8", 127),
        ("fp8", 448),
        ("int4 keys", 15),
        ("int4 values", 15),
        ("int8_per_channel keys", 255),
        ("int3 keys", 7),
        ("int3 values", 7),
        ("int2 keys", 3),
        ("int2 values", 3),
    ],
)
def test_what_float32_rounds_away_widens_no_scale(fmt, top):
    # The largest number that a scale of 1 holds, and a part of it that float64 alone tells apart.
    rows = np.zeros((1, 32, 64))
    rows[0, :2, :2] = top * (1 + 2.0**-30)
    for array, expected in zip(quantized(rows, fmt), quantized(rows.astype(np.float32), fmt), strict=True):
        np.testing.assert_array_equal(array, expected)
    assert quantized(rows, fmt)[0].max() == (0x7E if fmt == "fp8" else top)


@pytest.mark.parametrize("fmt", SHAPES)
def test_what_has_no_scale_has_codes_of_zero(fmt):
    codes, *scales = quantized(np.zeros((1, 32, 64), np.float32), fmt)
    assert not codes.any() and not any(np.asarray(scale).any() for scale in scales)


STORED = [("int8", False), ("fp8", True), ("int4", False), ("int4", True), ("bf16", True), ("int8_per_channel", False)]
STORED += [(fmt, value) for fmt in ("int3", "int2") for value in (False, True)]


@pytest.mark.parametrize(("fmt", "value"), STORED)
def test_what_is_stored_reads_as_codes_times_scales(fmt, value):
    rows = rounded(np.random.default_rng(6).standard_normal((64, 32)) * 9, "bf16")
    read = stored_values(rows, fmt, value, 32)
    assert read.dtype == np.float64 and read.shape == rows.shape
    np.testing.assert_array_equal(stored_values(rows.tolist(), fmt, value, 32), read)
    bounds = {
        "int8": 60 / 127,
        "fp8": 60 / 16,
        "int4": 60 / 15,
        "bf16": 0.0,
        "int8_per_channel": 60 / 255,
        "int3": 60 / 7,
        "int2": 60 / 3,
    }
    assert np.abs(read - rows).max() <= bounds[fmt]
    lines = {
        ("int8", False): read,
        ("fp8", True): read.reshape(2, -1),
        ("int4", True): read,
        ("int3", True): read,
        ("int2", True): read,
    }
    channels = read.reshape(2, 32, 32).swapaxes(1, 2).reshape(64, 32)
    # A row, a page or a channel of a page has one scale, and no more numbers than codes.
    if fmt != "bf16":
        most = max(len(np.unique(line)) for line in lines.get((fmt, value), channels))
        assert most <= {"int4": 16, "int3": 8, "int2": 4}.get(fmt, 255)


TINY, HUGE = 1e-45, 3e38  # a denormal whose share of any range is 0, and a number whose distance to its negative is infinite


@pytest.mark.parametrize("numbers", [(0, 0), (TINY, 0), (-HUGE, HUGE), (HUGE, 1), (np.inf, 1), (-np.inf, np.inf), (np.nan, -1)])
@pytest.mark.parametrize("fmt", SHAPES)
def test_no_number_gives_rise_to_a_warning(fmt, numbers):
    rows = np.zeros((1, 32, 64), np.float32)
    rows[0, :2, :2] = numbers
    rows[0, 0, 2], rows[0, 1, 3] = numbers
    rows[0, :, 32:] = numbers[0]
    with warnings.catch_warnings(), np.errstate(divide="warn", invalid="warn", over="warn"):
        warnings.simplefilter("error")
        quantized(rows, fmt)
        stored_values(rows[0], fmt.partition(" ")[0], fmt.endswith(" values"), 32)


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_an_infinity_is_no_number_in_fp8_which_has_none(bad):
    page = np.ones((1, 32, 8), np.float32)
    page[0, 5, 2] = bad
    codes = quantize_fp8(page)[0]
    assert codes[0, 5, 2] & 0x7F == 0x7F
    assert np.isnan(E4M3_VALUES[codes]).sum() == 1


def test_codes_and_scales_are_multiplied_in_float64():
    # 127 x (1 + 2^-7) needs 14 bits: the products of a code and a scale are exact.
    scales = np.array([0x3F81], np.uint16)
    for read, expected in (
        (dequantize_int8(np.array([[127, -3]], np.int8), scales), [127, -3]),
        (dequantize_fp8(np.array([[[0x7E, 0x01]]], np.uint8), scales), [448, 2.0**-9]),
    ):
        assert read.dtype == np.float64
        np.testing.assert_array_equal(read.ravel(), np.array(expected) * (1 + 2.0**-7))


def test_the_range_of_a_channel_is_computed_in_float32():
    # 15 x 4096 and the least half below 0 lie 61440 apart in float32: the scale needs no rounding up.
    page = np.zeros((1, 32, 1), np.float32)
    page[0, :2, 0] = 15 * 4096, -(2.0**-24)
    codes, scales, zeros = quantize_int4_keys(page)
    assert (scales[0, 0], zeros[0, 0], codes[0, 0, 0]) == (4096, np.float16(-(2.0**-24)), 15)
