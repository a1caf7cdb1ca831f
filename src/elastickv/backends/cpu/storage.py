"""Storing tokens: rounding, the ring of exact pages, and the page that leaves the window. Layouts are `layout`'s."""

import numpy as np
from numba import cfunc, njit

from elastickv.backends.cpu import layout
from elastickv.backends.cpu.intrinsics import (
    BF16,
    COLUMNS,
    FP16,
    FP32,
    INT8,
    float_bits,
    float_from_bits,
    load_f32,
    load_i8,
    load_i64,
    load_u16,
    store_f32,
    store_i8,
    store_i64,
    store_u16,
    words,
)
from elastickv.cache.quantise import INT8_LEVELS
from elastickv.recipe import PAGE_TOKENS

_F = layout.Field
DIM, SINKS, WINDOW, STRIDE, IS_DENSE = int(_F.DIM), int(_F.SINKS), int(_F.WINDOW), int(_F.STRIDE), int(_F.IS_DENSE)
COLD_FORMAT, COLD_BASE, COLD_PAGE_BYTES = int(_F.COLD_FORMAT), int(_F.COLD_BASE), int(_F.COLD_PAGE_BYTES)
COLD_HEAD_BYTES, EXACT_HEAD_BYTES = int(_F.COLD_HEAD_BYTES), int(_F.EXACT_HEAD_BYTES)
EXACT_FORMAT, EXACT_BASE, EXACT_PAGE_BYTES = int(_F.EXACT_FORMAT), int(_F.EXACT_BASE), int(_F.EXACT_PAGE_BYTES)
SINK_PAGES, RING_PAGES, STATE_BASE = int(_F.SINK_PAGES), int(_F.RING_PAGES), int(_F.STATE_BASE)
LENGTH, STEP, BAD = (8 * int(w) for w in (layout.State.LENGTH, layout.State.STEP, layout.State.BAD_POSITION))
STATE_BYTES = 8 * layout.STATE_WORDS
LEVELS = np.float32(INT8_LEVELS)
MAGIC = np.float32(12582912.0)
SUBNORMAL_MAGIC = np.float32(0.5)
TWO_112 = np.float32(2.0**112)


@njit(error_model="numpy")
def element_bytes(fmt):  # type: ignore[no-untyped-def]
    """Return the bytes of an element."""
    if fmt == FP32:
        return 4
    return 1 if fmt == INT8 else 2


@njit(error_model="numpy")
def cold_tokens(c, length):  # type: ignore[no-untyped-def]
    """Return how many of `length` tokens are cold, kept or not."""
    if c[IS_DENSE]:
        return 0
    return max(0, length - c[SINKS] - c[WINDOW]) // PAGE_TOKENS * PAGE_TOKENS


@njit(error_model="numpy")
def bf16_bits(x):  # type: ignore[no-untyped-def]
    """Round to bfloat16, ties to even; NaN stays NaN."""
    bits = float_bits(x)
    if x != x:
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(error_model="numpy")
def fp16_bits(x):  # type: ignore[no-untyped-def]
    """Round to half precision, ties to even; too large becomes infinite. In integers: not every host converts in hardware."""
    bits = np.int64(float_bits(x))
    sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        return np.uint16(sign | 0x7E00)
    if magnitude >= 0x47800000:
        return np.uint16(sign | 0x7C00)
    if magnitude < 0x38800000:
        # Adding 0.5 leaves the half's subnormal bits at the bottom, rounded by the processor.
        small = float_from_bits(np.uint32(magnitude)) + SUBNORMAL_MAGIC
        return np.uint16(sign | (np.int64(float_bits(small)) - 0x3F000000))
    return np.uint16(sign | ((magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13))


@njit(error_model="numpy")
def fp16_value(bits):  # type: ignore[no-untyped-def]
    """Return the float32 value of a half's bits."""
    magnitude, sign = np.uint32((bits & 0x7FFF) << 13), np.uint32((bits & 0x8000) << 16)
    if magnitude >= np.uint32(0x7C00 << 13):
        return float_from_bits(magnitude | np.uint32(0x7F800000) | sign)
    return float_from_bits(float_bits(float_from_bits(magnitude) * TWO_112) | sign)


@njit(error_model="numpy")
def bf16_value(bits):  # type: ignore[no-untyped-def]
    """Return the float32 value of a bfloat16's bits."""
    return float_from_bits(np.uint32(bits) << np.uint32(16))


@njit(error_model="numpy")
def key_offset(fmt, token, d):  # type: ignore[no-untyped-def]
    """Return the bytes from a page's start to element `d` of the key of its token number `token`."""
    if fmt == INT8:
        return d // 2 * 2 * PAGE_TOKENS + 2 * token + d % 2
    return (d * PAGE_TOKENS + token) * element_bytes(fmt)


@njit(error_model="numpy")
def value_offset(fmt, dim, token, d):  # type: ignore[no-untyped-def]
    """Return the bytes from a page's start to element `d` of the value of its token number `token`."""
    column = d % COLUMNS
    chunk = d - column
    columns = min(COLUMNS, dim - chunk)
    start = PAGE_TOKENS * (dim + chunk)
    if fmt == INT8:
        return start + token // 2 * 2 * columns + 2 * column + token % 2
    return (start + token * columns + column) * element_bytes(fmt)


@njit(error_model="numpy")
def _put(fmt, where, x):  # type: ignore[no-untyped-def]
    """Round and store one element; return whether it is finite as stored."""
    if fmt == FP32:
        store_f32(where, x)
        return x - x == np.float32(0)
    if fmt == BF16:
        bits = bf16_bits(x)
        store_u16(where, bits)
        return (bits & 0x7F80) != 0x7F80
    bits = fp16_bits(x)
    store_u16(where, bits)
    return (bits & 0x7C00) != 0x7C00


@njit(error_model="numpy")
def get(fmt, where):  # type: ignore[no-untyped-def]
    """Return one stored element, without its scale."""
    if fmt == FP32:
        return load_f32(where)
    if fmt == BF16:
        return bf16_value(load_u16(where))
    if fmt == FP16:
        return fp16_value(load_u16(where))
    return np.float32(load_i8(where))


@njit(error_model="numpy")
def cold_page(c, head, page):  # type: ignore[no-untyped-def]
    """Return the address of a cold page of a (sequence, KV head)."""
    return c[COLD_BASE] + head * c[COLD_HEAD_BYTES] + page * c[COLD_PAGE_BYTES]


@njit(error_model="numpy")
def exact_page(c, head, position):  # type: ignore[no-untyped-def]
    """Return the address of the exact page of a token, and the token's number in it."""
    start = c[EXACT_BASE] + head * c[EXACT_HEAD_BYTES]
    if position < c[SINKS]:
        return start + position // PAGE_TOKENS * c[EXACT_PAGE_BYTES], position % PAGE_TOKENS
    after = position - c[SINKS]
    slot = c[SINK_PAGES] + after // PAGE_TOKENS % c[RING_PAGES]
    return start + slot * c[EXACT_PAGE_BYTES], after % PAGE_TOKENS


@njit(error_model="numpy")
def _chill_row(c, source, token, target, slot, is_value):  # type: ignore[no-untyped-def]
    """Store one exact row as a cold row. The quantiser is `elastickv.cache.quantise`'s, bit for bit."""
    fmt, exact, dim = c[COLD_FORMAT], c[EXACT_FORMAT], c[DIM]
    divisor = np.float32(0)
    if fmt == INT8:
        peak = np.float32(0)
        for d in range(dim):
            offset = value_offset(exact, dim, token, d) if is_value else key_offset(exact, token, d)
            peak = max(peak, abs(get(exact, source + offset)))
        scale = np.uint16((float_bits(peak / LEVELS) + np.uint32(0xFFFF)) >> np.uint32(16))
        store_u16(target + 2 * PAGE_TOKENS * dim + 2 * (slot + (PAGE_TOKENS if is_value else 0)), scale)
        divisor = bf16_value(scale)
    for d in range(dim):
        x = get(exact, source + (value_offset(exact, dim, token, d) if is_value else key_offset(exact, token, d)))
        where = target + (value_offset(fmt, dim, slot, d) if is_value else key_offset(fmt, slot, d))
        if fmt != INT8:
            _put(fmt, where, x)
        elif divisor > np.float32(0):
            # |x / divisor| <= 127: adding 1.5 x 2^23 rounds it half to even.
            store_i8(where, np.int8((x / divisor + MAGIC) - MAGIC))
        else:
            store_i8(where, np.int8(0))


@njit(error_model="numpy")
def _chill(c, head, page):  # type: ignore[no-untyped-def]
    """Store the kept tokens of the page that leaves the window in the cold format."""
    source, _ = exact_page(c, head, c[SINKS] + page * PAGE_TOKENS)
    for token in range(PAGE_TOKENS):
        cold = page * PAGE_TOKENS + token
        if cold % c[STRIDE] == 0:
            number = cold // c[STRIDE]
            target, slot = cold_page(c, head, number // PAGE_TOKENS), number % PAGE_TOKENS
            _chill_row(c, source, token, target, slot, False)
            _chill_row(c, source, token, target, slot, True)


@cfunc("void(int64, int64, int64, int64)", cache=True, error_model="numpy")
def append_token(descriptor, head, keys, values):  # type: ignore[no-untyped-def]
    """Append the key and value (addresses of float32 rows) of one token to a (sequence, KV head)."""
    c = words(descriptor)
    state = c[STATE_BASE] + head * STATE_BYTES
    position = load_i64(state + LENGTH)
    fmt, dim = c[EXACT_FORMAT], c[DIM]
    page, token = exact_page(c, head, position)
    finite = True
    for d in range(dim):
        finite &= _put(fmt, page + key_offset(fmt, token, d), load_f32(keys + 4 * d))
        finite &= _put(fmt, page + value_offset(fmt, dim, token, d), load_f32(values + 4 * d))
    if not finite and load_i64(state + BAD) < 0:
        store_i64(state + BAD, position)
    store_i64(state + LENGTH, position + 1)
    before, after = cold_tokens(c, position), cold_tokens(c, position + 1)
    if after > before:
        _chill(c, head, before // PAGE_TOKENS)
