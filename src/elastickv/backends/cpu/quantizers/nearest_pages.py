"""Quantizers of a page to the nearest codes.

Each kind of format has a quantizer that is compiled by itself, so that only those in use are. Codes and scales equal those of
`elastickv.kvcache.quantize` bit for bit.
"""

import numpy as np

from elastickv.backends.cpu import layout
from elastickv.backends.cpu import quantize_vectors as vectors
from elastickv.backends.cpu.elements import (
    BY_CODE,
    bf16_towards,
    bf16_value,
    cold_page,
    exact_page,
    fp16_towards,
    fp16_value,
    get,
    key_plane_bytes,
    plane_bytes,
    put,
    scale_bytes,
    whole,
)
from elastickv.backends.cpu.intrinsics import (
    COLUMNS,
    float_bits,
    float_from_bits,
    inlined,
    load_i64,
    store_i8,
    store_i64,
    store_u16,
    words,
)
from elastickv.backends.cpu.numba_cache import Kernel, kernel
from elastickv.backends.cpu.page_codes import (
    EIGHT,
    FP8,
    INT2,
    INT3,
    INT4,
    INT8,
    INT8_PER_CHANNEL,
    ROWS,
    SCALES_STRIDE,
    SIXTEEN,
    ZEROS_BYTES,
    key_offset,
    value_offset,
)
from elastickv.recipe import FORMATS, PAGE_TOKENS, Recipe
from elastickv.recipe.formats import FLOAT16_MAX

_F = layout.BufferField
DIM, SINKS, STRIDE, EXACT_FORMAT = int(_F.DIM), int(_F.SINKS), int(_F.STRIDE), int(_F.EXACT_FORMAT)
COLD_KEY_FORMAT, COLD_VALUE_FORMAT = int(_F.COLD_KEY_FORMAT), int(_F.COLD_VALUE_FORMAT)
VALUE_GROUP, STATE_BASE = int(_F.VALUE_GROUP), int(_F.STATE_BASE)
BOUNDS_BASE, BOUNDS_HEAD_BYTES = int(_F.BOUNDS_BASE), int(_F.BOUNDS_HEAD_BYTES)
BEYOND = 8 * int(layout.State.BEYOND_POSITION)
STATE_BYTES = 8 * layout.STATE_WORDS
ZERO = np.float32(0)
LEVELS = np.array([FORMATS[name].largest_code for name in BY_CODE], np.float32)  # by format code
MAX_FP16 = np.float32(FLOAT16_MAX)
# Of a quantizer: the address of a cache's descriptor, a (sequence, KV head), the page's number, and 1 for V or 0 for K.
QUANTIZER = "void(int64, int64, int64, int64)"


@inlined
def planes(c, head, page, is_value):  # type: ignore[no-untyped-def]
    """Return the addresses of K or V: exact numbers, codes and scales."""
    exact, dim, key, value = c[EXACT_FORMAT], c[DIM], c[COLD_KEY_FORMAT], c[COLD_VALUE_FORMAT]
    source, _ = exact_page(c, head, c[SINKS] + page * PAGE_TOKENS)
    codes = cold_page(c, head, page)
    value_codes = codes + key_plane_bytes(key, dim)
    scales = value_codes + plane_bytes(value, dim)
    if is_value:
        return source + plane_bytes(exact, dim), value_codes, scales + scale_bytes(key, dim, dim, False)
    return source, codes, scales


@inlined
def _element(exact, plane, dim, token, d, is_value):  # type: ignore[no-untyped-def]
    return get(exact, plane + (value_offset(exact, dim, token, d) if is_value else key_offset(exact, token, d)))


@inlined
def _row(exact, source, token, fmt, target, slot, scales, dim, is_value):  # type: ignore[no-untyped-def]
    """Store one exact row of K or V as row `slot` of a plane of bf16, fp16 or int8."""
    divisor = ZERO
    if fmt == INT8:
        peak = ZERO
        for d in range(dim):
            peak = max(peak, abs(_element(exact, source, dim, token, d, is_value)))
        scale = np.uint16((float_bits(peak / LEVELS[INT8]) + np.uint32(0xFFFF)) >> np.uint32(16))
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


@inlined
def _ends(ends):  # type: ignore[no-untyped-def]
    """Return the least and the greatest number of `quantize_vectors.range_of_keys`."""
    return float_from_bits(np.uint32(ends & 0xFFFFFFFF)), float_from_bits(np.uint32((ends >> 32) & 0xFFFFFFFF))


@inlined
def _first_beyond(exact, source, dim):  # type: ignore[no-untyped-def]
    """Return the first token of K's page beyond what halves hold."""
    for token in range(PAGE_TOKENS):
        for d in range(dim):
            if abs(get(exact, source + key_offset(exact, token, d))) > MAX_FP16:
                return token
    return PAGE_TOKENS


@inlined
def key_bounds(c, head, page, source, levels):  # type: ignore[no-untyped-def]
    """Store a half scale and zero for each channel of K's page; record the first key beyond what halves hold.

    Returns the address of the scales, which the zeros follow.
    """
    exact, dim, beyond = c[EXACT_FORMAT], c[DIM], False
    bounds = c[BOUNDS_BASE] + head * c[BOUNDS_HEAD_BYTES] + page * dim * 4
    for d in range(dim):
        least, greatest = _ends(vectors.range_of_keys(exact, source, dim, d, 0, PAGE_TOKENS))
        beyond |= greatest > MAX_FP16 or least < -MAX_FP16
        zero_bits = fp16_towards(least, False)
        scale_bits = fp16_towards((greatest - fp16_value(zero_bits)) / levels, True)
        store_u16(bounds + 2 * d, scale_bits)
        store_u16(bounds + 2 * (dim + d), zero_bits)
    token = _first_beyond(exact, source, dim) if beyond else -1
    state = c[STATE_BASE] + head * STATE_BYTES
    if token >= 0 and load_i64(state + BEYOND) < 0:
        store_i64(state + BEYOND, c[SINKS] + page * PAGE_TOKENS + token)
    return bounds


@inlined
def group_scales(exact, source, dim, group, scales, levels):  # type: ignore[no-untyped-def]
    """Store a bfloat16 scale and zero for each token of each group of V's channels."""
    for start in range(0, dim, group):
        where = scales + start // group * SCALES_STRIDE
        for token in range(PAGE_TOKENS):
            least, greatest = _ends(vectors.range_of_values(exact, source, dim, token, start, group))
            zero_bits = bf16_towards(least, False)
            scale_bits = bf16_towards((greatest - bf16_value(zero_bits)) / levels, True)
            store_u16(where + 2 * token, scale_bits)
            store_u16(where + ZEROS_BYTES + 2 * token, zero_bits)


# Each stores the codes of K's page, with scales and zeros of channels that are `step` bytes apart.


@inlined
def four_bit_keys(exact, source, dim, scales, zeros, step, codes):  # type: ignore[no-untyped-def]
    """Store int4."""
    for d in range(0, dim, EIGHT):
        at = codes + key_offset(INT4, 0, d)
        vectors.four_bit_keys(exact, source, dim, d, 0, PAGE_TOKENS, scales + d * step, zeros + d * step, at, LEVELS[INT4])


@inlined
def three_bit_keys(exact, source, dim, scales, zeros, step, codes):  # type: ignore[no-untyped-def]
    """Store int3."""
    for d in range(0, dim, ROWS):
        at = codes + key_offset(INT3, 0, d)
        vectors.three_bit_keys(exact, source, dim, d, 0, PAGE_TOKENS, scales + d * step, zeros + d * step, at, LEVELS[INT3])


@inlined
def two_bit_keys(exact, source, dim, scales, zeros, step, codes):  # type: ignore[no-untyped-def]
    """Store int2."""
    for d in range(0, dim, SIXTEEN):
        at = codes + key_offset(INT2, 0, d)
        vectors.two_bit_keys(exact, source, dim, d, 0, PAGE_TOKENS, scales + d * step, zeros + d * step, at, LEVELS[INT2])


@inlined
def eight_bit_keys(exact, source, dim, scales, zeros, step, codes):  # type: ignore[no-untyped-def]
    """Store int8 per channel."""
    for d in range(0, dim, EIGHT):
        at = codes + key_offset(INT8_PER_CHANNEL, 0, d)
        vectors.channel_keys(exact, source, dim, d, scales + d * step, zeros + d * step, at, LEVELS[INT8_PER_CHANNEL])


# Each stores the codes of V's page; the scales and zeros of one group's tokens are `step` bytes from those of the next.


@inlined
def four_bit_values(exact, source, dim, group, scales, step, codes):  # type: ignore[no-untyped-def]
    """Store int4."""
    for start in range(0, dim, group):
        for first in range(start, start + group, COLUMNS):
            columns, where = min(COLUMNS, start + group - first), scales + start // group * step
            for token in range(0, PAGE_TOKENS, EIGHT):
                row, at = where + 2 * token, codes + plane_bytes(INT4, first) + token // EIGHT * columns * 4
                vectors.four_bit_values(exact, source, dim, token, first, columns, row, row + ZEROS_BYTES, at, LEVELS[INT4])


@inlined
def three_bit_values(exact, source, dim, group, scales, step, codes):  # type: ignore[no-untyped-def]
    """Store int3."""
    for start in range(0, dim, group):
        for first in range(start, start + group, COLUMNS):
            columns, where = min(COLUMNS, start + group - first), scales + start // group * step
            at = codes + plane_bytes(INT3, first)
            vectors.three_bit_values(exact, source, dim, 0, first, columns, where, where + ZEROS_BYTES, at, LEVELS[INT3])


@inlined
def two_bit_values(exact, source, dim, group, scales, step, codes):  # type: ignore[no-untyped-def]
    """Store int2."""
    for start in range(0, dim, group):
        for first in range(start, start + group, COLUMNS):
            columns, where = min(COLUMNS, start + group - first), scales + start // group * step
            for token in range(0, PAGE_TOKENS, SIXTEEN):
                row, at = where + 2 * token, codes + plane_bytes(INT2, first) + token // SIXTEEN * columns * 4
                vectors.two_bit_values(exact, source, dim, token, first, columns, row, row + ZEROS_BYTES, at, LEVELS[INT2])


PACKED_KEYS, PACKED_VALUES = ("int4", "int3", "int2", "int8_per_channel"), ("int4", "int3", "int2")


@inlined
def pack_keys(fmt, exact, source, dim, scales, zeros, step, codes):  # type: ignore[no-untyped-def]
    """Store the codes of K's page in one of `PACKED_KEYS`."""
    if fmt == INT4:
        four_bit_keys(exact, source, dim, scales, zeros, step, codes)
    elif fmt == INT3:
        three_bit_keys(exact, source, dim, scales, zeros, step, codes)
    elif fmt == INT2:
        two_bit_keys(exact, source, dim, scales, zeros, step, codes)
    elif fmt == INT8_PER_CHANNEL:
        eight_bit_keys(exact, source, dim, scales, zeros, step, codes)


@inlined
def pack_values(fmt, exact, source, dim, group, scales, step, codes):  # type: ignore[no-untyped-def]
    """Store the codes of V's page in one of `PACKED_VALUES`."""
    if fmt == INT4:
        four_bit_values(exact, source, dim, group, scales, step, codes)
    elif fmt == INT3:
        three_bit_values(exact, source, dim, group, scales, step, codes)
    elif fmt == INT2:
        two_bit_values(exact, source, dim, group, scales, step, codes)


@kernel(QUANTIZER)
def quantize_int8(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store a page in int8."""
    c = words(descriptor)
    source, codes, scales = planes(c, head, page, is_value)
    if is_value:
        vectors.symmetric_values(c[EXACT_FORMAT], source, c[DIM], codes, scales, LEVELS[INT8])
    else:
        vectors.symmetric_keys(c[EXACT_FORMAT], source, c[DIM], codes, scales, LEVELS[INT8])


@kernel(QUANTIZER)
def quantize_fp8(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store a page in fp8."""
    c = words(descriptor)
    source, codes, scales = planes(c, head, page, is_value)
    vectors.float_page(c[EXACT_FORMAT], source, c[DIM], codes, scales, LEVELS[FP8])


@kernel(QUANTIZER)
def quantize_keys_int4(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store K of a page in int4; record the first key beyond what halves hold."""
    c = words(descriptor)
    source, codes, _ = planes(c, head, page, is_value)
    bounds = key_bounds(c, head, page, source, LEVELS[INT4])
    four_bit_keys(c[EXACT_FORMAT], source, c[DIM], bounds, bounds + 2 * c[DIM], 2, codes)


@kernel(QUANTIZER)
def quantize_keys_int3(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store K of a page in int3; record the first key beyond what halves hold."""
    c = words(descriptor)
    source, codes, _ = planes(c, head, page, is_value)
    bounds = key_bounds(c, head, page, source, LEVELS[INT3])
    three_bit_keys(c[EXACT_FORMAT], source, c[DIM], bounds, bounds + 2 * c[DIM], 2, codes)


@kernel(QUANTIZER)
def quantize_keys_int2(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store K of a page in int2; record the first key beyond what halves hold."""
    c = words(descriptor)
    source, codes, _ = planes(c, head, page, is_value)
    bounds = key_bounds(c, head, page, source, LEVELS[INT2])
    two_bit_keys(c[EXACT_FORMAT], source, c[DIM], bounds, bounds + 2 * c[DIM], 2, codes)


@kernel(QUANTIZER)
def quantize_keys_int8_per_channel(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store K of a page in int8 per channel; record the first key beyond what halves hold."""
    c = words(descriptor)
    source, codes, _ = planes(c, head, page, is_value)
    bounds = key_bounds(c, head, page, source, LEVELS[INT8_PER_CHANNEL])
    eight_bit_keys(c[EXACT_FORMAT], source, c[DIM], bounds, bounds + 2 * c[DIM], 2, codes)


@kernel(QUANTIZER)
def quantize_values_int4(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store V of a page in int4."""
    c = words(descriptor)
    source, codes, scales = planes(c, head, page, is_value)
    group_scales(c[EXACT_FORMAT], source, c[DIM], c[VALUE_GROUP], scales, LEVELS[INT4])
    four_bit_values(c[EXACT_FORMAT], source, c[DIM], c[VALUE_GROUP], scales, SCALES_STRIDE, codes)


@kernel(QUANTIZER)
def quantize_values_int3(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store V of a page in int3."""
    c = words(descriptor)
    source, codes, scales = planes(c, head, page, is_value)
    group_scales(c[EXACT_FORMAT], source, c[DIM], c[VALUE_GROUP], scales, LEVELS[INT3])
    three_bit_values(c[EXACT_FORMAT], source, c[DIM], c[VALUE_GROUP], scales, SCALES_STRIDE, codes)


@kernel(QUANTIZER)
def quantize_values_int2(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store V of a page in int2."""
    c = words(descriptor)
    source, codes, scales = planes(c, head, page, is_value)
    group_scales(c[EXACT_FORMAT], source, c[DIM], c[VALUE_GROUP], scales, LEVELS[INT2])
    two_bit_values(c[EXACT_FORMAT], source, c[DIM], c[VALUE_GROUP], scales, SCALES_STRIDE, codes)


@kernel(QUANTIZER)
def store_rows(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store the retained rows of a page in bf16, fp16 or int8."""
    c = words(descriptor)
    source, codes, scales = planes(c, head, page, is_value)
    fmt = c[COLD_VALUE_FORMAT] if is_value else c[COLD_KEY_FORMAT]
    for token in range(PAGE_TOKENS):
        cold = page * PAGE_TOKENS + token
        if cold % c[STRIDE] == 0:
            number = cold // c[STRIDE]
            shift = cold_page(c, head, number // PAGE_TOKENS) - cold_page(c, head, page)
            slot = number % PAGE_TOKENS
            _row(c[EXACT_FORMAT], source, token, fmt, codes + shift, slot, scales + shift, c[DIM], is_value)


def quantizers(recipe: Recipe, dtype: str) -> tuple[Kernel, Kernel]:
    """Return the kernels that store K and V of a page that leaves the window of a recipe's cache."""
    exact = recipe.exact_dtype(dtype)
    return _quantizer(recipe.key_format or exact, recipe.stride, False), _quantizer(
        recipe.value_format or exact, recipe.stride, True
    )


def _quantizer(fmt: str, stride: int, is_value: bool) -> Kernel:
    whole_pages = {
        "int8": quantize_int8,
        "int4": quantize_values_int4 if is_value else quantize_keys_int4,
        "fp8": quantize_fp8,
        "int8_per_channel": quantize_keys_int8_per_channel,
        "int3": quantize_values_int3 if is_value else quantize_keys_int3,
        "int2": quantize_values_int2 if is_value else quantize_keys_int2,
    }
    return whole_pages.get(fmt, store_rows) if stride == 1 else store_rows
