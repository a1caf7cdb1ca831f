"""Quantizers of a page that make the error of each channel good in those that follow: `kvcache.gptq`.

Scales and zeros are those of `nearest_pages`. The codes are chosen as float32 numbers, one row of 32 tokens for each channel,
and packed by the quantizers of `quantize_vectors`, with scales of 1 and zeros of 0.
"""

import numpy as np

from elastickv.backends.cpu import layout
from elastickv.backends.cpu import quantize_vectors as vectors
from elastickv.backends.cpu.elements import BY_CODE, fp16_value
from elastickv.backends.cpu.intrinsics import (
    FP32,
    inlined,
    load_f32,
    load_i64,
    load_u16,
    store_i8,
    store_u16,
    words,
)
from elastickv.backends.cpu.numba_cache import Kernel, kernel
from elastickv.backends.cpu.page_codes import SCALES_STRIDE, ZEROS_BYTES, key_offset, value_offset
from elastickv.backends.cpu.quantizers import nearest_pages
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
from elastickv.backends.cpu.quantizers.nearest_pages import (
    COLD_KEY_FORMAT,
    COLD_VALUE_FORMAT,
    DIM,
    EXACT_FORMAT,
    LEVELS,
    PACKED_KEYS,
    PACKED_VALUES,
    QUANTIZER,
    VALUE_GROUP,
    ZERO,
    group_scales,
    key_bounds,
    pack_keys,
    pack_values,
    planes,
)
from elastickv.errors import UsageError
from elastickv.recipe import FORMATS, PAGE_TOKENS, Recipe
from elastickv.recipe.formats import ScaleLayout

_F = layout.BufferField
KV_HEADS = int(_F.KV_HEADS)
KEY_ORDER, KEY_SHARES = int(_F.KEY_ORDER), int(_F.KEY_SHARES)
VALUE_ORDER, VALUE_SHARES = int(_F.VALUE_ORDER), int(_F.VALUE_SHARES)
GPTQ_BASE, GPTQ_HEAD_BYTES = int(_F.GPTQ_BASE), int(_F.GPTQ_HEAD_BYTES)
BY_TOKEN = np.array([FORMATS[name].keys is ScaleLayout.TOKEN for name in BY_CODE])  # scales; codes of both signs, no zeros
ONE_FP16, ONE_BF16, NO_BITS = np.uint16(0x3C00), np.uint16(0x3F80), np.uint16(0)


@inlined
def _scratch(c, head, one):  # type: ignore[no-untyped-def]
    """Return the addresses of rows of codes, rows of errors, and 32 scales of 1, which 32 zeros follow."""
    rows = c[GPTQ_BASE] + head * c[GPTQ_HEAD_BYTES]
    ones = rows + 2 * c[DIM] * ROW_BYTES
    zeros = ones + ZEROS_BYTES
    for token in range(PAGE_TOKENS):
        store_u16(ones + 2 * token, one)
        store_u16(zeros + 2 * token, NO_BITS)
    return rows, rows + c[DIM] * ROW_BYTES, ones


@inlined
def _whole_number(rows, token, d):  # type: ignore[no-untyped-def]
    return np.int8(load_f32(rows + d * ROW_BYTES + 4 * token))


@kernel(QUANTIZER)
def quantize_keys_gptq(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store K of a page in an integer format."""
    c = words(descriptor)
    source, codes, scales = planes(c, head, page, is_value)
    exact, dim, fmt = c[EXACT_FORMAT], c[DIM], c[COLD_KEY_FORMAT]
    rows, errors, ones = _scratch(c, head, ONE_FP16)
    levels, bounds, zeros = LEVELS[fmt], scales, ones + ZEROS_BYTES
    if BY_TOKEN[fmt]:
        vectors.symmetric_keys(exact, source, dim, codes, scales, levels)
    else:
        bounds = key_bounds(c, head, page, source, levels)
    order = c[KEY_ORDER] + head % c[KV_HEADS] * dim * 8
    shares = c[KEY_SHARES] + head % c[KV_HEADS] * dim * dim * 4
    for j in range(dim):
        d = load_i64(order + 8 * j)
        row, error = rows + d * ROW_BYTES, errors + j * ROW_BYTES
        keys_row(exact, source, dim, d, row, ZERO if BY_TOKEN[fmt] else fp16_value(load_u16(bounds + 2 * (dim + d))))
        if j > 0:
            subtract_errors(row, errors, shares + j * dim * 4, j)
        if BY_TOKEN[fmt]:
            round_by_token(row, error, scales, -levels, levels)
        else:
            round_keys(row, error, fp16_value(load_u16(bounds + 2 * d)), ZERO, levels)
    if BY_TOKEN[fmt]:
        for d in range(dim):
            for token in range(PAGE_TOKENS):
                store_i8(codes + key_offset(fmt, token, d), _whole_number(rows, token, d))
        return
    pack_keys(fmt, FP32, rows, dim, ones, zeros, 0, codes)


@kernel(QUANTIZER)
def quantize_values_gptq(descriptor, head, page, is_value):  # type: ignore[no-untyped-def]
    """Store V of a page in an integer format."""
    c = words(descriptor)
    source, codes, scales = planes(c, head, page, is_value)
    exact, dim, fmt, group = c[EXACT_FORMAT], c[DIM], c[COLD_VALUE_FORMAT], c[VALUE_GROUP]
    rows, errors, ones = _scratch(c, head, ONE_BF16)
    levels = LEVELS[fmt]
    if BY_TOKEN[fmt]:
        vectors.symmetric_values(exact, source, dim, codes, scales, levels)
    else:
        group_scales(exact, source, dim, group, scales, levels)
    values_rows(exact, source, dim, rows)
    order = c[VALUE_ORDER] + head % c[KV_HEADS] * dim * 8
    shares = c[VALUE_SHARES] + head % c[KV_HEADS] * dim * dim * 4
    for j in range(dim):
        d = load_i64(order + 8 * j)
        row, at = rows + d * ROW_BYTES, scales
        if not BY_TOKEN[fmt]:
            at = scales + d // group * SCALES_STRIDE
            subtract_zeros(row, at + ZEROS_BYTES)
        if j > 0:
            subtract_errors(row, errors, shares + j * dim * 4, j)
        round_by_token(row, errors + j * ROW_BYTES, at, -levels if BY_TOKEN[fmt] else ZERO, levels)
    if BY_TOKEN[fmt]:
        for d in range(dim):
            for token in range(PAGE_TOKENS):
                store_i8(codes + value_offset(fmt, dim, token, d), _whole_number(rows, token, d))
        return
    values_plane(rows, dim, errors)
    pack_values(fmt, FP32, errors, dim, group, ones, 0, codes)


_SYMMETRIC = [name for name in BY_CODE if FORMATS[name].keys is ScaleLayout.TOKEN]
KEYS: dict[str, Kernel] = dict.fromkeys([*_SYMMETRIC, *PACKED_KEYS], quantize_keys_gptq)
VALUES: dict[str, Kernel] = dict.fromkeys([*_SYMMETRIC, *PACKED_VALUES], quantize_values_gptq)


def quantizers(recipe: Recipe, dtype: str) -> tuple[Kernel, Kernel]:
    """Return the kernels that store K and V of a page that leaves the window of a recipe's cache.

    Raises
    ------
    UsageError : if no kernel rounds a format as the recipe says.
    """
    keys, values = nearest_pages.quantizers(recipe, dtype)
    if not recipe.uses_hessians:
        return keys, values
    return _gptq(recipe.key_format, KEYS, keys), _gptq(recipe.value_format, VALUES, values)


def _gptq(fmt: str | None, kernels: dict[str, Kernel], nearest: Kernel) -> Kernel:
    if fmt is None or not FORMATS[fmt].is_integer:
        return nearest
    if fmt not in kernels:
        raise UsageError(f"format {fmt} has no CPU kernel for rounding=gptq: choose {', '.join(kernels)}")
    return kernels[fmt]
