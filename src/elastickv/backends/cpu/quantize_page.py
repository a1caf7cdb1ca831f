"""Quantizes the page that leaves the window. The results equal those of `elastickv.kvcache.quantize` bit for bit."""

import numpy as np
from numba import njit

from elastickv.backends.cpu import layout
from elastickv.backends.cpu.elements import (
    bf16_towards,
    bf16_value,
    cold_page,
    e4m3_bits,
    exact_page,
    fp16_towards,
    fp16_value,
    get,
    key_offset,
    plane_bytes,
    put,
    scale_bytes,
    value_offset,
    whole,
)
from elastickv.backends.cpu.intrinsics import (
    FP8,
    INT4,
    INT8,
    float_bits,
    float_from_bits,
    load_i64,
    load_u16,
    store_i8,
    store_i64,
    store_u16,
)
from elastickv.kvcache.quantize import FP8_MAX, INT4_LEVELS, INT8_LEVELS
from elastickv.recipe import PAGE_TOKENS
from elastickv.recipe.formats import FLOAT16_MAX

_F = layout.BufferField
DIM, SINKS, STRIDE, EXACT_FORMAT = int(_F.DIM), int(_F.SINKS), int(_F.STRIDE), int(_F.EXACT_FORMAT)
COLD_KEY_FORMAT, COLD_VALUE_FORMAT = int(_F.COLD_KEY_FORMAT), int(_F.COLD_VALUE_FORMAT)
VALUE_GROUP, STATE_BASE = int(_F.VALUE_GROUP), int(_F.STATE_BASE)
BOUNDS_BASE, BOUNDS_HEAD_BYTES = int(_F.BOUNDS_BASE), int(_F.BOUNDS_HEAD_BYTES)
BEYOND = 8 * int(layout.State.BEYOND_POSITION)
STATE_BYTES = 8 * layout.STATE_WORDS
ZERO, LARGE = np.float32(0), np.float32(np.inf)
LEVELS_8, LEVELS_4 = np.float32(INT8_LEVELS), np.float32(INT4_LEVELS)
MAX_FP8, MAX_FP16 = np.float32(FP8_MAX), np.float32(FLOAT16_MAX)


@njit(error_model="numpy")
def _element(exact, plane, dim, token, d, is_value):  # type: ignore[no-untyped-def]
    return get(exact, plane + (value_offset(exact, dim, token, d) if is_value else key_offset(exact, token, d)))


@njit(error_model="numpy")
def _row(exact, source, token, fmt, target, slot, scales, dim, is_value):  # type: ignore[no-untyped-def]
    """Store one exact row of K or V as row `slot` of a plane of bf16, fp16 or int8."""
    divisor = ZERO
    if fmt == INT8:
        peak = ZERO
        for d in range(dim):
            peak = max(peak, abs(_element(exact, source, dim, token, d, is_value)))
        scale = np.uint16((float_bits(peak / LEVELS_8) + np.uint32(0xFFFF)) >> np.uint32(16))
        store_u16(scales + 2 * slot, scale)
        divisor = bf16_value(scale)
    for d in range(dim):
        x = _element(exact, source, dim, token, d, is_value)
        where = target + (value_offset(fmt, dim, slot, d) if is_value else key_offset(fmt, slot, d))
        if fmt != INT8:
            put(fmt, where, x)
        elif divisor > ZERO:
            store_i8(where, np.int8(whole(x / divisor)))
        else:
            store_i8(where, np.int8(0))


@njit(error_model="numpy")
def _page_fp8(exact, source, target, scales, dim, is_value):  # type: ignore[no-untyped-def]
    peak = ZERO
    for d in range(dim):
        for token in range(PAGE_TOKENS):
            peak = max(peak, abs(_element(exact, source, dim, token, d, is_value)))
    power = (float_bits(peak / MAX_FP8) + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)
    store_u16(scales, np.uint16(power >> np.uint32(16)))
    divisor = float_from_bits(power)
    for d in range(dim):
        for token in range(PAGE_TOKENS):
            x = _element(exact, source, dim, token, d, is_value)
            where = target + (value_offset(FP8, dim, token, d) if is_value else key_offset(FP8, token, d))
            store_i8(where, np.int8(e4m3_bits(x / divisor if divisor > ZERO else ZERO)))


@njit(error_model="numpy")
def _code(x, scale, zero):  # type: ignore[no-untyped-def]
    """Return the int4 code of x: 0 if the scale is 0 or the result is not finite."""
    if not scale > ZERO:
        return 0
    steps = (x - zero) / scale
    return np.int64(whole(min(steps, LEVELS_4))) if steps > ZERO else 0


@njit(error_model="numpy")
def _put_code(where, number, code):  # type: ignore[no-untyped-def]
    """Put the code of element `number` of eight into its 16-bit word; the first in a word clears it."""
    nibble = number // 2
    before = np.int64(load_u16(where)) if nibble > 0 else 0
    store_u16(where, np.uint16(before | code << (4 * nibble)))


@njit(error_model="numpy")
def _keys_int4(exact, source, target, bounds, dim):  # type: ignore[no-untyped-def]
    """Store K's page, a half scale and zero for each channel. Return the first token beyond what halves hold, or -1."""
    beyond = PAGE_TOKENS
    for d in range(dim):
        least, greatest = LARGE, -LARGE
        for token in range(PAGE_TOKENS):
            x = get(exact, source + key_offset(exact, token, d))
            least, greatest = min(least, x), max(greatest, x)
            if abs(x) > MAX_FP16 and token < beyond:
                beyond = token
        zero_bits = fp16_towards(least, False)
        zero = fp16_value(zero_bits)
        scale_bits = fp16_towards((greatest - zero) / LEVELS_4, True)
        scale = fp16_value(scale_bits)
        store_u16(bounds + 2 * d, scale_bits)
        store_u16(bounds + 2 * (dim + d), zero_bits)
        for token in range(PAGE_TOKENS):
            x = get(exact, source + key_offset(exact, token, d))
            _put_code(target + key_offset(INT4, token, d), d % 8, _code(x, scale, zero))
    return beyond if beyond < PAGE_TOKENS else -1


@njit(error_model="numpy")
def _values_int4(exact, source, target, scales, dim, group):  # type: ignore[no-untyped-def]
    """Store V's page, a bfloat16 scale and zero for each token and group of channels."""
    for token in range(PAGE_TOKENS):
        for start in range(0, dim, group):
            least, greatest = LARGE, -LARGE
            for d in range(start, start + group):
                x = get(exact, source + value_offset(exact, dim, token, d))
                least, greatest = min(least, x), max(greatest, x)
            zero_bits = bf16_towards(least, False)
            zero = bf16_value(zero_bits)
            scale_bits = bf16_towards((greatest - zero) / LEVELS_4, True)
            scale = bf16_value(scale_bits)
            where = scales + start // group * 4 * PAGE_TOKENS + 2 * token
            store_u16(where, scale_bits)
            store_u16(where + 2 * PAGE_TOKENS, zero_bits)
            for d in range(start, start + group):
                x = get(exact, source + value_offset(exact, dim, token, d))
                _put_code(target + value_offset(INT4, group, token, d), token % 8, _code(x, scale, zero))


@njit(error_model="numpy")
def quantize_page(c, head, page):  # type: ignore[no-untyped-def]
    """Store the retained tokens of the page that leaves the window in the cold formats."""
    exact, dim, group = c[EXACT_FORMAT], c[DIM], c[VALUE_GROUP]
    key, value = c[COLD_KEY_FORMAT], c[COLD_VALUE_FORMAT]
    source, _ = exact_page(c, head, c[SINKS] + page * PAGE_TOKENS)
    values = source + plane_bytes(exact, dim)
    target = cold_page(c, head, page)
    target_values = target + plane_bytes(key, dim)
    key_scales = target_values + plane_bytes(value, dim)
    value_scales = key_scales + scale_bytes(key, dim, group, False)
    if key == INT4:
        beyond = _keys_int4(exact, source, target, c[BOUNDS_BASE] + head * c[BOUNDS_HEAD_BYTES] + page * dim * 4, dim)
        state = c[STATE_BASE] + head * STATE_BYTES
        if beyond >= 0 and load_i64(state + BEYOND) < 0:
            store_i64(state + BEYOND, c[SINKS] + page * PAGE_TOKENS + beyond)
    if value == INT4:
        _values_int4(exact, values, target_values, value_scales, dim, group)
    for plane in range(2):
        fmt, start, out, scales = key, source, target, key_scales
        if plane == 1:
            fmt, start, out, scales = value, values, target_values, value_scales
        if fmt == FP8:
            _page_fp8(exact, start, out, scales, dim, plane == 1)
        if fmt in (FP8, INT4):
            continue
        for token in range(PAGE_TOKENS):
            cold = page * PAGE_TOKENS + token
            if cold % c[STRIDE] == 0:
                number = cold // c[STRIDE]
                shift = cold_page(c, head, number // PAGE_TOKENS) - target
                _row(exact, start, token, fmt, out + shift, number % PAGE_TOKENS, scales + shift, dim, plane == 1)
