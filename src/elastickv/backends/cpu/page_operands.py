"""How decode reads the codes of each format: rows as operands, and where scales are applied.

A new format is added here, and as `page_codes` says.
"""

from typing import Any

import numpy as np
from llvmlite import ir

from elastickv.backends.cpu.elements import bf16_value
from elastickv.backends.cpu.intrinsics import (
    BF16,
    BLOCK,
    COLUMNS,
    FORMAT_CODES,
    FP32,
    HALVES,
    I8,
    I16,
    I64,
    LANES,
    VF,
    inlined,
    load,
    load_bf16,
    load_f32,
    load_u16,
    multiply_add,
    store_f32,
    widen_bf16,
    widen_e4m3,
    widen_fp16,
)
from elastickv.backends.cpu.page_codes import (
    EIGHT,
    FEW_BITS,
    FP8,
    INT2,
    INT3,
    INT4,
    INT8,
    INT8_PER_CHANNEL,
    PAIRS_OF_WORD,
    ROWS,
    SIXTEEN,
    WORDS,
)
from elastickv.backends.cpu.scale_folding import fold_page, fold_page_floats, to_integers, total_of, weigh, weigh_with_zeros
from elastickv.recipe import FORMATS, PAGE_TOKENS

ROW_BYTES = {FP32: 128, INT4: 128, INT3: 384, INT2: 128}  # of 32 columns; 64 or less for the others
PAIRS = ir.VectorType(I16, 2 * LANES)
INTEGERS = (INT8, *FEW_BITS)  # multiplied by 16-bit integers
SCALED = tuple(code for name, code in FORMAT_CODES.items() if not FORMATS[name].is_float)
BIASED = (*FEW_BITS, INT8_PER_CHANNEL)  # each query has a number that is added to its scores
FP8_FACTOR = np.float32(256)  # `load_row` gives 1/256 of the numbers
ONE = np.float32(1)


def load_row(builder: ir.IRBuilder, fmt: int, row: Any, row_bytes: Any) -> list[list[Any]]:
    """Load one row of 32 columns as two operands of 16; for int8, a pair of rows, for int4 four, for int2 8, for int3 16."""
    if fmt == FP32:
        return [[load(builder, row, VF, half * LANES * 4) for half in range(HALVES)]]
    if fmt == INT8:
        narrow = ir.VectorType(I8, 2 * LANES)
        return [[builder.sext(load(builder, row, narrow, half * 2 * LANES), PAIRS) for half in range(HALVES)]]
    if fmt in (INT4, INT2):
        packed, bits = [load(builder, row, PAIRS, half * LANES * 4) for half in range(HALVES)], 4 if fmt == INT4 else 2
        return [[_packed(builder, word, first, bits) for word in packed] for first in range(0, 16, bits)]
    if fmt == INT3:
        return _three_bits(builder, row, row_bytes)
    if fmt == FP8:
        narrow = ir.VectorType(I8, LANES)
        return [[widen_e4m3(builder, load(builder, row, narrow, half * LANES)) for half in range(HALVES)]]
    if fmt == INT8_PER_CHANNEL:
        codes = ir.VectorType(I8, LANES)
        return [[builder.uitofp(load(builder, row, codes, half * LANES), VF) for half in range(HALVES)]]
    widen = widen_bf16 if fmt == BF16 else widen_fp16
    bits = ir.VectorType(I16, LANES)
    return [[widen(builder, load(builder, row, bits, half * LANES * 2)) for half in range(HALVES)]]


def _every(value: int) -> Any:
    return ir.Constant(PAIRS, [value] * 2 * LANES)


def _packed(builder: ir.IRBuilder, words: Any, first: int, bits: int) -> Any:
    """Return the codes at bit `first` of 16-bit words."""
    shifted = builder.lshr(words, _every(first)) if first else words
    return builder.and_(shifted, _every((1 << bits) - 1)) if first < 16 - bits else shifted


def _three_bits(builder: ir.IRBuilder, row: Any, row_bytes: Any) -> list[list[Any]]:
    """Return 16 pairs of rows of int3: five of each word, and one of the bits that the words have left."""
    word_bytes = builder.udiv(row_bytes, I64(WORDS))
    pairs, last = [], [_every(0)] * HALVES
    for number in range(WORDS):
        first = builder.add(row, builder.mul(word_bytes, I64(number)))
        words = [load(builder, first, PAIRS, half * LANES * 4) for half in range(HALVES)]
        for pair in range(PAIRS_OF_WORD):
            shifted = [builder.lshr(word, _every(3 * pair)) for word in words] if pair else words
            pairs.append([builder.and_(codes, _every(7)) for codes in shifted])
        bits = [builder.and_(builder.lshr(word, _every(15 - number)), _every(1 << number)) for word in words]
        last = [builder.or_(whole, bit) for whole, bit in zip(last, bits, strict=True)]
    return [*pairs, last]


def scaled(builder: ir.IRBuilder, fmt: int, total: Any, is_value: bool, scale: Any, added: Any, extra: Any, half: int) -> Any:
    """Return 16 sums of products times the scales; `scale`, `added`, `extra` as in `vector.multiply_page`."""
    if fmt in INTEGERS:
        total = builder.sitofp(total, VF)
    if fmt in BIASED and not is_value:
        return multiply_add(builder, total, scale, added)
    if fmt in SCALED:
        total = builder.fmul(total, scale)
    if fmt == INT8 and not is_value:
        total = builder.fmul(total, load_bf16(builder, extra, half))
    return total


@inlined
def rows_at_once(fmt):  # type: ignore[no-untyped-def]
    """Return how many rows are interleaved."""
    if fmt == INT3:
        return ROWS
    if fmt == INT2:
        return SIXTEEN
    if fmt == INT4:
        return EIGHT
    return 2 if fmt == INT8 else 1


@inlined
def query_factor(key):  # type: ignore[no-untyped-def]
    """Return what queries are multiplied by."""
    return FP8_FACTOR if key == FP8 else ONE


@inlined
def narrow_query(key, query, dim, narrow, unit):  # type: ignore[no-untyped-def]
    """Make a query integers, for keys whose scales are not folded into it."""
    if key == INT8:
        to_integers(query, dim, narrow, unit)


@inlined
def _fill(units, block, scale):  # type: ignore[no-untyped-def]
    for g in range(block):
        store_f32(units + 4 * g, scale)


@inlined
def key_operands(key, first, block, dim, queries, narrow, narrow_units, units, scales_at, bounds, prefetch_bytes):  # type: ignore[no-untyped-def]
    """Fold a page's scales into a block of queries; return the addresses of the queries, their bytes, units, and `extra`."""
    query = queries + first * dim * 4
    if key in FEW_BITS:
        biases = units + BLOCK * 4
        fold_page(0, block, bounds, dim, query, dim * 4, narrow, dim * 2, units, biases, prefetch_bytes)
        return narrow, dim * 2, units, biases
    if key == INT8_PER_CHANNEL:
        biases = units + BLOCK * 4
        fold_page_floats(0, block, bounds, dim, query, dim * 4, narrow, biases, prefetch_bytes)
        _fill(units, block, ONE)
        return narrow, dim * 4, units, biases
    if key == INT8:
        return narrow + first * dim * 2, dim * 2, narrow_units + 4 * first, scales_at
    if key == FP8:
        _fill(units, block, bf16_value(load_u16(scales_at)))
    return query, dim * 4, units, scales_at


@inlined
def weigh_tokens(value, block, number, scores, weights, units, scales_at, factor, sums, zero_bytes):  # type: ignore[no-untyped-def]
    """Fold the scales of V of group `number` into a block's probabilities; `sums` are of probability x zero."""
    if value == INT8:
        for g in range(block):
            weigh(scores + g * COLUMNS * 4, scales_at, weights + g * COLUMNS * 2, units + 4 * g)
    elif value in FEW_BITS:
        for g in range(block):
            weigh_with_zeros(
                scores + g * COLUMNS * 4, scales_at + number * 4 * PAGE_TOKENS, weights + g * COLUMNS * 2, units + 4 * g,
                factor + 4 * g, sums + number * LANES * 4 + g * zero_bytes,
            )  # fmt: skip
    elif value == FP8:
        _fill(units, block, bf16_value(load_u16(scales_at)))


@inlined
def finish_values(value, target, source, columns, sums):  # type: ignore[no-untyped-def]
    """Write the accumulators of one group of columns as results; `sums` are of probability x zero."""
    if value in FEW_BITS:
        added = total_of(sums)
        for d in range(columns):
            store_f32(target + 4 * d, load_f32(source + 4 * d) + added)
    else:
        factor = FP8_FACTOR if value == FP8 else ONE
        for d in range(columns):
            store_f32(target + 4 * d, load_f32(source + 4 * d) * factor)
