"""Codes and scales of a page in each format: where an element is, and reading back.

A new format is added here, in `quantizers.nearest_pages` for storing, and in `page_operands` for decode.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickv.backends.cpu import layout
from elastickv.backends.cpu.elements import (
    bf16_value,
    fp16_value,
    get,
    plane_bytes,
    scale_group,
)
from elastickv.backends.cpu.intrinsics import (
    COLUMNS,
    FORMAT_CODES,
    inlined,
    load_i8,
    load_u16,
)
from elastickv.kvcache.attention import Float64
from elastickv.kvcache.quantize import (
    CODECS,
    E4M3_VALUES,
)
from elastickv.kvcache.rounding import from_bf16_bits
from elastickv.recipe import FORMATS, PAGE_TOKENS
from elastickv.recipe.formats import ScaleLayout

Bytes = NDArray[np.uint8]
Numbers = NDArray[Any]
INT8, FP8, INT4, INT8_PER_CHANNEL = (FORMAT_CODES[n] for n in ("int8", "fp8", "int4", "int8_per_channel"))
INT3, INT2 = (FORMAT_CODES[n] for n in ("int3", "int2"))
FEW_BITS = (INT4, INT3, INT2)  # with a zero beside each scale of V, too
EIGHT, SIXTEEN = 8, 16  # rows of int4, and of int2, that are interleaved in a 32-bit word
# Of a column of int3: rows that are interleaved, 32-bit words, and pairs of codes in each.
ROWS, WORDS, PAIRS_OF_WORD = 32, 3, 5
# Of V: from a group's scales to its zeros, and to the scales of the next group.
ZEROS_BYTES, SCALES_STRIDE = 2 * PAGE_TOKENS, 4 * PAGE_TOKENS


@inlined
def key_offset(fmt, token, d):  # type: ignore[no-untyped-def]
    """Return the bytes from a page's start to element `d` of the key of its token number `token`.

    Of int4 and int2 it is the element's 16-bit word, of int3 the first of three.
    """
    if fmt == INT4:
        return (d // EIGHT * PAGE_TOKENS + token) * 4 + d % 2 * 2
    if fmt == INT3:
        return (d // ROWS * WORDS * PAGE_TOKENS + token) * 4 + d % 2 * 2
    if fmt == INT2:
        return (d // SIXTEEN * PAGE_TOKENS + token) * 4 + d % 2 * 2
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
        return start + (token // EIGHT * columns + column) * 4 + token % 2 * 2
    if fmt == INT2:
        return start + (token // SIXTEEN * columns + column) * 4 + token % 2 * 2
    if fmt == INT8:
        return start + token // 2 * 2 * columns + 2 * column + token % 2
    return start + (token * columns + column) * (plane_bytes(fmt, 1) // PAGE_TOKENS)


@inlined
def _packed(where, number, bits):  # type: ignore[no-untyped-def]
    """Return code `number` of those that a 32-bit word holds: int4 or int2."""
    return np.float64(np.int64(load_u16(where)) >> (bits * (number // 2)) & ((1 << bits) - 1))


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
    if fmt == INT8_PER_CHANNEL or fmt in FEW_BITS:
        step = np.float64(fp16_value(load_u16(bounds + 2 * d)))
        zero = np.float64(fp16_value(load_u16(bounds + 2 * (dim + d))))
        if fmt == INT3:
            return _three_bits(where, 4 * PAGE_TOKENS, d % ROWS // 2) * step + zero
        if fmt == INT2:
            return _packed(where, d % SIXTEEN, 2) * step + zero
        return (_packed(where, d % EIGHT, 4) if fmt == INT4 else np.float64(np.int64(load_i8(where)) & 255)) * step + zero
    if fmt in (INT8, FP8):
        return _eight_bits(fmt, where, np.float64(bf16_value(load_u16(scales + (2 * token if fmt == INT8 else 0)))))
    return np.float64(get(fmt, where))


@inlined
def value_number(fmt, codes, scales, dim, group, token, d):  # type: ignore[no-untyped-def]
    """Return the float64 number of element `d` of a token's value."""
    where = codes + value_offset(fmt, scale_group(fmt, dim, group), token, d)
    if fmt in FEW_BITS:
        at = scales + d // group * SCALES_STRIDE + 2 * token
        step, zero = np.float64(bf16_value(load_u16(at))), np.float64(bf16_value(load_u16(at + ZEROS_BYTES)))
        if fmt == INT3:
            return _three_bits(where, 4 * _place_in_chunk(group, d)[1], token // 2) * step + zero
        if fmt == INT2:
            return _packed(where, token % SIXTEEN, 2) * step + zero
        return _packed(where, token % EIGHT, 4) * step + zero
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
    group : channels of V that share a scale in 4 bits and fewer.
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


def _unpacked(words: Numbers, bits: int) -> Numbers:
    """(..., 2) 16-bit words -> (..., 32 / bits) codes of 4 or 2 bits: number 2i + h is field i of word h."""
    shifts = np.arange(0, 16, bits, dtype=np.uint16)[:, None]
    return np.asarray(words[..., None, :] >> shifts & ((1 << bits) - 1), np.uint8).reshape(*words.shape[:-1], 32 // bits)


def _triples(words: Numbers) -> Numbers:
    """(n, 3, columns, 2) 16-bit words -> (n, 32 rows, columns) codes of int3."""
    fives = words[:, :, None] >> (3 * np.arange(PAIRS_OF_WORD, dtype=np.uint16)[:, None, None]) & 7
    last = (words >> 15 << np.arange(WORDS, dtype=np.uint16)[:, None, None]).sum(axis=1, keepdims=True, dtype=np.uint16)
    pairs = np.concatenate([fives.reshape(len(words), -1, *words.shape[2:]), last], axis=1)
    return np.asarray(pairs.transpose(0, 1, 3, 2), np.uint8).reshape(len(words), ROWS, -1)


def _keys(plane: Bytes, fmt: str, head_dim: int) -> Numbers:
    """(pages, bytes) -> (pages, 32 tokens, head_dim) elements as stored."""
    elements, bits = _elements(plane, fmt), FORMATS[fmt].bits
    if bits == 3:
        codes = _triples(elements.reshape(-1, WORDS, PAGE_TOKENS, 2))
        return codes.reshape(len(plane), -1, PAGE_TOKENS).transpose(0, 2, 1)[..., :head_dim]
    if bits in (4, 2):
        codes = _unpacked(elements.reshape(-1, head_dim * bits // 32, PAGE_TOKENS, 2), bits)
        return codes.transpose(0, 2, 1, 3).reshape(-1, PAGE_TOKENS, head_dim)
    if FORMATS[fmt].signed:
        pairs = elements.reshape(-1, head_dim // 2, PAGE_TOKENS, 2)
        return pairs.transpose(0, 2, 1, 3).reshape(-1, PAGE_TOKENS, head_dim)
    return elements.reshape(-1, head_dim, PAGE_TOKENS).transpose(0, 2, 1)


def _values(plane: Bytes, fmt: str, head_dim: int, group: int) -> Numbers:
    """(pages, bytes) -> (pages, 32 tokens, head_dim) elements as stored."""
    chunks, bits = [], FORMATS[fmt].bits
    for start in range(0, head_dim, group):
        for column in range(start, start + group, COLUMNS):
            columns = min(COLUMNS, start + group - column)
            first, last = (layout.plane_bytes(fmt, column), layout.plane_bytes(fmt, column + columns))
            chunk = _elements(plane[:, first:last], fmt)
            if bits == 3:
                chunk = _triples(chunk.reshape(-1, WORDS, columns, 2))
            if bits in (4, 2):
                chunk = _unpacked(chunk.reshape(-1, PAGE_TOKENS * bits // 32, columns, 2), bits).transpose(0, 1, 3, 2)
            if FORMATS[fmt].signed:
                chunk = chunk.reshape(-1, PAGE_TOKENS // 2, columns, 2).transpose(0, 1, 3, 2)
            chunks.append(chunk.reshape(-1, PAGE_TOKENS, columns))
    return np.concatenate(chunks, axis=2)
