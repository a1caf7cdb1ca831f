"""Quantizers of a page that make the error of each channel good in those that follow: `kvcache.gptq`.

Scales and zeros are those of `page_codes`. The codes are chosen as float32 numbers, one row of 32 tokens for each channel, and
packed by the quantizers of `quantize_vectors`, with scales of 1 and zeros of 0.
"""

import numpy as np

from elastickv.backends.cpu import layout, page_codes
from elastickv.backends.cpu import quantize_vectors as vectors
from elastickv.backends.cpu.elements import fp16_value
from elastickv.backends.cpu.intrinsics import COLUMNS, FP32, inlined, load_f32, load_i64, load_u16, store_i8, store_u16, words
from elastickv.backends.cpu.numba_cache import Kernel, kernel
from elastickv.backends.cpu.page_codes import (
    COLD_KEY_FORMAT,
    COLD_VALUE_FORMAT,
    DIM,
    EIGHT,
    EXACT_FORMAT,
    INT3,
    INT4,
    INT8,
    INT8_PER_CHANNEL,
    LEVELS_3,
    LEVELS_4,
    LEVELS_8,
    LEVELS_CHANNEL,
    QUANTIZER,
    ROWS,
    VALUE_GROUP,
    WORDS,
    ZERO,
    group_scales,
    key_bounds,
    key_offset,
    planes,
    value_offset,
)
from elastickv.backends.cpu.quantizers.gptq_vectors import (
    ROW_BYTES,
    keys_row,
    round_by_token,
    round_keys,
    subtract_errors,
    subtract_zeros,
    values_plane,
    values_rows,
)
from elastickv.errors import UsageError
from elastickv.recipe import FORMATS, PAGE_TOKENS, Recipe

_F = layout.BufferField
KV_HEADS = int(_F.KV_HEADS)
KEY_ORDER, KEY_SHARES = int(_F.KEY_ORDER), int(_F.KEY_SHARES)
VALUE_ORDER, VALUE_SHARES = int(_F.VALUE_ORDER), int(_F.VALUE_SHARES)
GPTQ_BASE, GPTQ_HEAD_BYTES = int(_F.GPTQ_BASE), int(_F.GPTQ_HEAD_BYTES)
ONE_FP16, ONE_BF16, NO_BITS = np.uint16(0x3C00), np.uint16(0x3F80), np.uint16(0)


@inlined
def _scratch(c, head, one):  # type: ignore[no-untyped-def]
    """Return the addresses of rows of codes, rows of errors, 32 scales of 1, and 32 zeros."""
    rows = c[GPTQ_BASE] + head * c[GPTQ_HEAD_BYTES]
    ones = rows + 2 * c[DIM] * ROW_BYTES
    zeros = ones + 2 * PAGE_TOKENS
    for token in range(PAGE_TOKENS):
        store_u16(ones + 2 * token, one)
        store_u16(zeros + 2 * token, NO_BITS)
    return rows, rows + c[DIM] * ROW_BYTES, ones, zeros


@inlined
def _whole_number(rows, token, d):  # type: ignore[no-untyped-def]
    return np.int8(load_f32(rows + d * ROW_BYTES + 4 * token))


@inlined
def _levels(fmt):  # type: ignore[no-untyped-def]
    if fmt == INT8:
        return LEVELS_8
    if fmt == INT8_PER_CHANNEL:
        return LEVELS_CHANNEL
    return LEVELS_4 if fmt == INT4 else LEVELS_3


@kernel(QUANTIZER)
def quantize_keys_gptq(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store K of a page in int4, int3, int8_per_channel or int8."""
    c = words(descriptor)
    source, codes, scales = planes(c, head, page, is_value)
    exact, dim, fmt = c[EXACT_FORMAT], c[DIM], c[COLD_KEY_FORMAT]
    rows, errors, ones, zeros = _scratch(c, head, ONE_FP16)
    levels, bounds = _levels(fmt), scales
    if fmt == INT8:
        vectors.symmetric_keys(exact, source, dim, codes, scales, LEVELS_8)
    else:
        bounds = key_bounds(c, head, page, source, levels)
    order = c[KEY_ORDER] + head % c[KV_HEADS] * dim * 8
    shares = c[KEY_SHARES] + head % c[KV_HEADS] * dim * dim * 4
    for j in range(dim):
        d = load_i64(order + 8 * j)
        row, error = rows + d * ROW_BYTES, errors + j * ROW_BYTES
        keys_row(exact, source, dim, d, row, ZERO if fmt == INT8 else fp16_value(load_u16(bounds + 2 * (dim + d))))
        if j > 0:
            subtract_errors(row, errors, shares + j * dim * 4, j)
        if fmt == INT8:
            round_by_token(row, error, scales, -levels, levels)
        else:
            round_keys(row, error, fp16_value(load_u16(bounds + 2 * d)), ZERO, levels)
    if fmt == INT8:
        for d in range(dim):
            for token in range(PAGE_TOKENS):
                store_i8(codes + key_offset(fmt, token, d), _whole_number(rows, token, d))
        return
    if fmt == INT3:
        for d in range(0, dim, ROWS):
            vectors.three_bit_keys(FP32, rows, dim, d, 0, PAGE_TOKENS, ones, zeros, codes + key_offset(fmt, 0, d), levels)
        return
    for d in range(0, dim, EIGHT):
        if fmt == INT4:
            vectors.eight_keys(FP32, rows, dim, d, 0, PAGE_TOKENS, ones, zeros, codes + d * PAGE_TOKENS // 2, levels)
        else:
            vectors.channel_keys(FP32, rows, dim, d, ones, zeros, codes + d * PAGE_TOKENS, levels)


@kernel(QUANTIZER)
def quantize_values_gptq(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store V of a page in int4, int3 or int8."""
    c = words(descriptor)
    source, codes, scales = planes(c, head, page, is_value)
    exact, dim, fmt, group = c[EXACT_FORMAT], c[DIM], c[COLD_VALUE_FORMAT], c[VALUE_GROUP]
    rows, errors, ones, zeros = _scratch(c, head, ONE_BF16)
    levels = _levels(fmt)
    if fmt == INT8:
        vectors.symmetric_values(exact, source, dim, codes, scales, LEVELS_8)
    else:
        for start in range(0, dim, group):
            group_scales(exact, source, dim, start, group, scales, levels)
    values_rows(exact, source, dim, rows)
    order = c[VALUE_ORDER] + head % c[KV_HEADS] * dim * 8
    shares = c[VALUE_SHARES] + head % c[KV_HEADS] * dim * dim * 4
    for j in range(dim):
        d = load_i64(order + 8 * j)
        row, at = rows + d * ROW_BYTES, scales
        if fmt != INT8:
            at = scales + d // group * 4 * PAGE_TOKENS
            subtract_zeros(row, at + 2 * PAGE_TOKENS)
        if j > 0:
            subtract_errors(row, errors, shares + j * dim * 4, j)
        round_by_token(row, errors + j * ROW_BYTES, at, -levels if fmt == INT8 else ZERO, levels)
    if fmt == INT8:
        for d in range(dim):
            for token in range(PAGE_TOKENS):
                store_i8(codes + value_offset(fmt, dim, token, d), _whole_number(rows, token, d))
        return
    values_plane(rows, dim, errors)
    for start in range(0, dim, group):
        for first in range(start, start + group, COLUMNS):
            columns = min(COLUMNS, start + group - first)
            if fmt == INT3:
                target = codes + first * 4 * WORDS
                vectors.three_bit_values(FP32, errors, dim, 0, first, columns, ones, zeros, target, levels)
            else:
                for token in range(0, PAGE_TOKENS, EIGHT):
                    target = codes + (first * PAGE_TOKENS + token * columns) // 2
                    vectors.eight_values(FP32, errors, dim, token, first, columns, ones, zeros, target, levels)


KEYS: dict[str, Kernel] = dict.fromkeys(("int8", "int4", "int3", "int8_per_channel"), quantize_keys_gptq)
VALUES: dict[str, Kernel] = dict.fromkeys(("int8", "int4", "int3"), quantize_values_gptq)


def quantizers(recipe: Recipe, dtype: str) -> tuple[Kernel, Kernel]:
    """Return the kernels that store K and V of a page that leaves the window of a recipe's cache.

    Raises
    ------
    UsageError : if no kernel rounds a format as the recipe says.
    """
    keys, values = page_codes.quantizers(recipe, dtype)
    if not recipe.uses_hessians:
        return keys, values
    return _gptq(recipe.key_format, KEYS, keys), _gptq(recipe.value_format, VALUES, values)


def _gptq(fmt: str | None, kernels: dict[str, Kernel], nearest: Kernel) -> Kernel:
    if fmt is None or not FORMATS[fmt].is_integer:
        return nearest
    if fmt not in kernels:
        raise UsageError(f"format {fmt} has no CPU kernel for rounding=gptq: choose {', '.join(kernels)}")
    return kernels[fmt]
