"""Codes and scales of a page in each format: where an element is, the quantizers, and reading back.

Each kind of format has a quantizer that is compiled by itself, so that only those in use are.
A new format is added here, and in `page_operands` for decode. Codes and scales equal those of `elastickv.kvcache.quantize` bit
for bit.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickv.backends.cpu import layout
from elastickv.backends.cpu import quantize_vectors as vectors
from elastickv.backends.cpu.elements import (
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
    scale_group,
    whole,
)
from elastickv.backends.cpu.intrinsics import (
    COLUMNS,
    FORMAT_CODES,
    float_bits,
    float_from_bits,
    inlined,
    load_i8,
    load_i64,
    load_u16,
    store_i8,
    store_i64,
    store_u16,
    words,
)
from elastickv.backends.cpu.numba_cache import Kernel, kernel
from elastickv.kvcache.attention import Float64
from elastickv.kvcache.quantize import (
    CODECS,
    E4M3_VALUES,
    FP8_MAX,
    INT3_LEVELS,
    INT4_LEVELS,
    INT8_LEVELS,
    INT8_PER_CHANNEL_LEVELS,
)
from elastickv.kvcache.rounding import from_bf16_bits
from elastickv.recipe import FORMATS, PAGE_TOKENS, Recipe
from elastickv.recipe.formats import FLOAT16_MAX, ScaleLayout

Bytes = NDArray[np.uint8]
Numbers = NDArray[Any]
INT8, FP8, INT4, INT8_PER_CHANNEL, INT3 = (FORMAT_CODES[n] for n in ("int8", "fp8", "int4", "int8_per_channel", "int3"))
_F = layout.BufferField
DIM, SINKS, STRIDE, EXACT_FORMAT = int(_F.DIM), int(_F.SINKS), int(_F.STRIDE), int(_F.EXACT_FORMAT)
COLD_KEY_FORMAT, COLD_VALUE_FORMAT = int(_F.COLD_KEY_FORMAT), int(_F.COLD_VALUE_FORMAT)
VALUE_GROUP, STATE_BASE = int(_F.VALUE_GROUP), int(_F.STATE_BASE)
BOUNDS_BASE, BOUNDS_HEAD_BYTES = int(_F.BOUNDS_BASE), int(_F.BOUNDS_HEAD_BYTES)
BEYOND = 8 * int(layout.State.BEYOND_POSITION)
STATE_BYTES = 8 * layout.STATE_WORDS
ZERO = np.float32(0)
LEVELS_8, LEVELS_4, LEVELS_3 = np.float32(INT8_LEVELS), np.float32(INT4_LEVELS), np.float32(INT3_LEVELS)
LEVELS_CHANNEL = np.float32(INT8_PER_CHANNEL_LEVELS)
MAX_FP8, MAX_FP16 = np.float32(FP8_MAX), np.float32(FLOAT16_MAX)
EIGHT = 8  # rows of int4 that are interleaved
# Of a column of int3: rows that are interleaved, 32-bit words, and pairs of codes in each.
ROWS, WORDS, PAIRS_OF_WORD = 32, 3, 5
# Of a quantizer: the address of a cache's descriptor, a (sequence, KV head), the page's number, and 1 for V or 0 for K.
QUANTIZER = "void(int64, int64, int64, int64)"


@inlined
def key_offset(fmt, token, d):  # type: ignore[no-untyped-def]
    """Return the bytes from a page's start to element `d` of the key of its token number `token`.

    Of int4 it is the element's 16-bit word, of int3 the first of three.
    """
    if fmt == INT4:
        return (d // EIGHT * PAGE_TOKENS + token) * 4 + d % 2 * 2
    if fmt == INT3:
        return (d // ROWS * WORDS * PAGE_TOKENS + token) * 4 + d % 2 * 2
    if fmt == INT8:
        return d // 2 * 2 * PAGE_TOKENS + 2 * token + d % 2
    return plane_bytes(fmt, d) + token * (plane_bytes(fmt, 1) // PAGE_TOKENS)


@inlined
def _place_in_chunk(group, d):  # type: ignore[no-untyped-def]
    """Return the column of element `d` in its chunk of V, and the chunk's columns."""
    within = d if d < group else d % group  # a division takes longer than the rest
    column = within % COLUMNS
    return column, min(COLUMNS, group - within + column)


@inlined
def value_offset(fmt, group, token, d):  # type: ignore[no-untyped-def]
    """Return the bytes from V's start to element `d` of the value of token `token`, in groups of `group` channels.

    Of int3 it is the first of three 16-bit words.
    """
    column, columns = _place_in_chunk(group, d)
    start = plane_bytes(fmt, d - column)
    if fmt == INT3:
        return start + column * 4 + token % 2 * 2
    if fmt == INT4:
        return start + (token // 8 * columns + column) * 4 + token % 2 * 2
    if fmt == INT8:
        return start + token // 2 * 2 * columns + 2 * column + token % 2
    return start + (token * columns + column) * (plane_bytes(fmt, 1) // PAGE_TOKENS)


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
def group_scales(exact, source, dim, start, group, scales, levels):  # type: ignore[no-untyped-def]
    """Store a bfloat16 scale and zero for each token of a group of V's channels; return the address of the scales."""
    where = scales + start // group * 4 * PAGE_TOKENS
    for token in range(PAGE_TOKENS):
        least, greatest = _ends(vectors.range_of_values(exact, source, dim, token, start, group))
        zero_bits = bf16_towards(least, False)
        scale_bits = bf16_towards((greatest - bf16_value(zero_bits)) / levels, True)
        store_u16(where + 2 * token, scale_bits)
        store_u16(where + 2 * (PAGE_TOKENS + token), zero_bits)
    return where


@inlined
def _values_int4(exact, source, target, scales, dim, group):  # type: ignore[no-untyped-def]
    """Store V's page."""
    for start in range(0, dim, group):
        where = group_scales(exact, source, dim, start, group, scales, LEVELS_4)
        for column in range(0, group, COLUMNS):
            columns, first = min(COLUMNS, group - column), start + column
            for token in range(0, PAGE_TOKENS, EIGHT):
                at, codes = where + 2 * token, target + (first * PAGE_TOKENS + token * columns) // 2
                vectors.eight_values(exact, source, dim, token, first, columns, at, at + 2 * PAGE_TOKENS, codes, LEVELS_4)


@inlined
def _values_int3(exact, source, target, scales, dim, group):  # type: ignore[no-untyped-def]
    """Store V's page."""
    for start in range(0, dim, group):
        where = group_scales(exact, source, dim, start, group, scales, LEVELS_3)
        for column in range(0, group, COLUMNS):
            columns, first = min(COLUMNS, group - column), start + column
            codes = target + first * 4 * WORDS
            vectors.three_bit_values(exact, source, dim, 0, first, columns, where, where + 2 * PAGE_TOKENS, codes, LEVELS_3)


@kernel(QUANTIZER)
def quantize_int8(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store a page in int8."""
    c = words(descriptor)
    source, codes, scales = planes(c, head, page, is_value)
    if is_value:
        vectors.symmetric_values(c[EXACT_FORMAT], source, c[DIM], codes, scales, LEVELS_8)
    else:
        vectors.symmetric_keys(c[EXACT_FORMAT], source, c[DIM], codes, scales, LEVELS_8)


@kernel(QUANTIZER)
def quantize_fp8(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store a page in fp8."""
    c = words(descriptor)
    source, codes, scales = planes(c, head, page, is_value)
    vectors.float_page(c[EXACT_FORMAT], source, c[DIM], codes, scales, MAX_FP8)


@kernel(QUANTIZER)
def quantize_keys_int4(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store K of a page in int4; record the first key beyond what halves hold."""
    c = words(descriptor)
    source, codes, _ = planes(c, head, page, is_value)
    exact, dim, bounds = c[EXACT_FORMAT], c[DIM], key_bounds(c, head, page, source, LEVELS_4)
    for d in range(0, dim, EIGHT):
        scales, at = bounds + 2 * d, codes + d * PAGE_TOKENS // 2
        vectors.eight_keys(exact, source, dim, d, 0, PAGE_TOKENS, scales, scales + 2 * dim, at, LEVELS_4)


@kernel(QUANTIZER)
def quantize_keys_int3(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store K of a page in int3; record the first key beyond what halves hold."""
    c = words(descriptor)
    source, codes, _ = planes(c, head, page, is_value)
    exact, dim, bounds = c[EXACT_FORMAT], c[DIM], key_bounds(c, head, page, source, LEVELS_3)
    for d in range(0, dim, ROWS):
        at = codes + key_offset(INT3, 0, d)
        vectors.three_bit_keys(exact, source, dim, d, 0, PAGE_TOKENS, bounds + 2 * d, bounds + 2 * (dim + d), at, LEVELS_3)


@kernel(QUANTIZER)
def quantize_keys_int8_per_channel(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store K of a page in int8 per channel; record the first key beyond what halves hold."""
    c = words(descriptor)
    source, codes, _ = planes(c, head, page, is_value)
    exact, dim, bounds = c[EXACT_FORMAT], c[DIM], key_bounds(c, head, page, source, LEVELS_CHANNEL)
    for d in range(0, dim, EIGHT):
        scales = bounds + 2 * d
        vectors.channel_keys(exact, source, dim, d, scales, scales + 2 * dim, codes + d * PAGE_TOKENS, LEVELS_CHANNEL)


@kernel(QUANTIZER)
def quantize_values_int4(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store V of a page in int4."""
    c = words(descriptor)
    source, codes, scales = planes(c, head, page, is_value)
    _values_int4(c[EXACT_FORMAT], source, codes, scales, c[DIM], c[VALUE_GROUP])


@kernel(QUANTIZER)
def quantize_values_int3(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store V of a page in int3."""
    c = words(descriptor)
    source, codes, scales = planes(c, head, page, is_value)
    _values_int3(c[EXACT_FORMAT], source, codes, scales, c[DIM], c[VALUE_GROUP])


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
    }
    return whole_pages.get(fmt, store_rows) if stride == 1 else store_rows


@inlined
def _nibble(where, number):  # type: ignore[no-untyped-def]
    return np.float64(np.int64(load_u16(where)) >> (4 * (number // 2)) & 15)


@inlined
def _three_bits(where, word_bytes, pair):  # type: ignore[no-untyped-def]
    """Return the int3 code of pair `pair` of rows in words that are `word_bytes` apart."""
    if pair < WORDS * PAIRS_OF_WORD:
        word = np.int64(load_u16(where + pair // PAIRS_OF_WORD * word_bytes))
        return np.float64(word >> (pair % PAIRS_OF_WORD * 3) & 7)
    code = np.int64(0)
    for number in range(WORDS):
        code |= np.int64(load_u16(where + number * word_bytes)) >> 15 << number
    return np.float64(code)


@inlined
def _eight_bits(fmt, where, scale):  # type: ignore[no-untyped-def]
    code = np.int64(load_i8(where))
    return (E4M3_VALUES[code & 255] if fmt == FP8 else np.float64(code)) * scale


@inlined
def key_number(fmt, codes, scales, bounds, dim, token, d):  # type: ignore[no-untyped-def]
    """Return the float64 number of element `d` of a token's key."""
    where = codes + key_offset(fmt, token, d)
    if fmt in (INT4, INT3, INT8_PER_CHANNEL):
        step = np.float64(fp16_value(load_u16(bounds + 2 * d)))
        zero = np.float64(fp16_value(load_u16(bounds + 2 * (dim + d))))
        if fmt == INT3:
            return _three_bits(where, 4 * PAGE_TOKENS, d % ROWS // 2) * step + zero
        return (_nibble(where, d % EIGHT) if fmt == INT4 else np.float64(np.int64(load_i8(where)) & 255)) * step + zero
    if fmt in (INT8, FP8):
        return _eight_bits(fmt, where, np.float64(bf16_value(load_u16(scales + (2 * token if fmt == INT8 else 0)))))
    return np.float64(get(fmt, where))


@inlined
def value_number(fmt, codes, scales, dim, group, token, d):  # type: ignore[no-untyped-def]
    """Return the float64 number of element `d` of a token's value."""
    where = codes + value_offset(fmt, scale_group(fmt, dim, group), token, d)
    if fmt in (INT4, INT3):
        at = scales + d // group * 4 * PAGE_TOKENS + 2 * token
        step, zero = np.float64(bf16_value(load_u16(at))), np.float64(bf16_value(load_u16(at + 2 * PAGE_TOKENS)))
        if fmt == INT3:
            return _three_bits(where, 4 * _place_in_chunk(group, d)[1], token // 2) * step + zero
        return _nibble(where, token % 8) * step + zero
    if fmt in (INT8, FP8):
        return _eight_bits(fmt, where, np.float64(bf16_value(load_u16(scales + (2 * token if fmt == INT8 else 0)))))
    return np.float64(get(fmt, where))


@np.errstate(invalid="ignore", over="ignore")  # values that are not finite stay so: the cache reports them
def unpack_rows(
    raw: Bytes, bounds: Bytes, formats: tuple[str, str], head_dim: int, group: int, rows: NDArray[np.int64]
) -> tuple[Float64, Float64]:
    """Return (rows, head_dim) keys and values, dequantized in float64 by NumPy, of tokens `rows` in the pages of a KV head.

    Parameters
    ----------
    raw : its pages.
    bounds : its scales and zeros of channels of K.
    formats : of K and V.
    group : channels of V that share an int4 or int3 scale.
    """
    if not len(rows):
        return np.zeros((0, head_dim)), np.zeros((0, head_dim))
    used, inverse = np.unique(rows // PAGE_TOKENS, return_inverse=True)
    pages = raw.reshape(-1, layout.page_bytes(*formats, head_dim, group))[used]
    key, value = formats
    sizes = (
        layout.key_plane_bytes(key, head_dim),
        layout.plane_bytes(value, head_dim),
        layout.scale_bytes(key, head_dim, group, False),
    )
    parts = np.split(pages, np.cumsum(sizes), axis=1)
    keys = _keys(parts[0], key, head_dim)
    values = _values(parts[1], value, head_dim, group)
    plane = bounds[: len(bounds) // (4 * head_dim) * 4 * head_dim].view(np.float16).reshape(-1, 2, head_dim)
    if FORMATS[key].keys is ScaleLayout.CHANNEL:
        read_keys = CODECS[key].dequantize_keys(keys, *plane[used].transpose(1, 0, 2))
    else:
        read_keys = _numbers(keys, parts[2], key, False, group)
    read_values = _numbers(values, parts[3], value, True, group)
    tokens = rows % PAGE_TOKENS
    return read_keys[inverse, tokens], read_values[inverse, tokens]


def _numbers(codes: Numbers, scales: Bytes, fmt: str, value: bool, group: int) -> Float64:
    """Return the numbers of codes of V, or of K, whose scales are stored in their page."""
    if FORMATS[fmt].is_float:
        return (from_bf16_bits(codes) if fmt == "bf16" else codes).astype(np.float64)
    dequantize = CODECS[fmt].dequantize_values if value else CODECS[fmt].dequantize_keys
    shared_by = FORMATS[fmt].values if value else FORMATS[fmt].keys
    bits = np.ascontiguousarray(scales).view(np.uint16)
    if shared_by is ScaleLayout.GROUP:
        groups = codes.shape[2] // group
        planes = bits[:, : 2 * PAGE_TOKENS * groups].reshape(-1, groups, 2, PAGE_TOKENS)
        return dequantize(codes, *planes.transpose(2, 0, 3, 1))
    return dequantize(codes, bits[:, :PAGE_TOKENS] if shared_by is ScaleLayout.TOKEN else bits[:, 0])


def _elements(plane: Bytes, fmt: str) -> Numbers:
    kinds = {"fp32": np.float32, "fp16": np.float16}
    kind = kinds.get(fmt) or (np.int8 if FORMATS[fmt].signed else np.uint8 if FORMATS[fmt].bits == 8 else np.uint16)
    return np.ascontiguousarray(plane).view(kind)


def _nibbles(words: Numbers) -> Numbers:
    """(..., 2) 16-bit words -> (..., 8) codes: number 2i + h is nibble i of word h."""
    shifts = 4 * np.arange(4, dtype=np.uint16)[:, None]
    return np.asarray(words[..., None, :] >> shifts & 15, np.uint8).reshape(*words.shape[:-1], 8)


def _triples(words: Numbers) -> Numbers:
    """(n, 3, columns, 2) 16-bit words -> (n, 32 rows, columns) codes of int3."""
    fives = words[:, :, None] >> (3 * np.arange(PAIRS_OF_WORD, dtype=np.uint16)[:, None, None]) & 7
    last = (words >> 15 << np.arange(WORDS, dtype=np.uint16)[:, None, None]).sum(axis=1, keepdims=True, dtype=np.uint16)
    pairs = np.concatenate([fives.reshape(len(words), -1, *words.shape[2:]), last], axis=1)
    return np.asarray(pairs.transpose(0, 1, 3, 2), np.uint8).reshape(len(words), ROWS, -1)


def _keys(plane: Bytes, fmt: str, head_dim: int) -> Numbers:
    """(pages, bytes) -> (pages, 32 tokens, head_dim) elements as stored."""
    elements = _elements(plane, fmt)
    if FORMATS[fmt].bits == 3:
        codes = _triples(elements.reshape(-1, WORDS, PAGE_TOKENS, 2))
        return codes.reshape(len(plane), -1, PAGE_TOKENS).transpose(0, 2, 1)[..., :head_dim]
    if FORMATS[fmt].bits == 4:
        codes = _nibbles(elements.reshape(-1, head_dim // 8, PAGE_TOKENS, 2))
        return codes.transpose(0, 2, 1, 3).reshape(-1, PAGE_TOKENS, head_dim)
    if FORMATS[fmt].signed:
        pairs = elements.reshape(-1, head_dim // 2, PAGE_TOKENS, 2)
        return pairs.transpose(0, 2, 1, 3).reshape(-1, PAGE_TOKENS, head_dim)
    return elements.reshape(-1, head_dim, PAGE_TOKENS).transpose(0, 2, 1)


def _values(plane: Bytes, fmt: str, head_dim: int, group: int) -> Numbers:
    """(pages, bytes) -> (pages, 32 tokens, head_dim) elements as stored."""
    chunks = []
    for start in range(0, head_dim, group):
        for column in range(start, start + group, COLUMNS):
            columns = min(COLUMNS, start + group - column)
            first, last = (layout.plane_bytes(fmt, column), layout.plane_bytes(fmt, column + columns))
            chunk = _elements(plane[:, first:last], fmt)
            if FORMATS[fmt].bits == 3:
                chunk = _triples(chunk.reshape(-1, WORDS, columns, 2))
            if FORMATS[fmt].bits == 4:
                chunk = _nibbles(chunk.reshape(-1, PAGE_TOKENS // 8, columns, 2)).transpose(0, 1, 3, 2)
            if FORMATS[fmt].signed:
                chunk = chunk.reshape(-1, PAGE_TOKENS // 2, columns, 2).transpose(0, 1, 3, 2)
            chunks.append(chunk.reshape(-1, PAGE_TOKENS, columns))
    return np.concatenate(chunks, axis=2)
