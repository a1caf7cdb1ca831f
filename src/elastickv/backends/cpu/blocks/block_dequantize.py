"""Pages as rows of float32 numbers, in vector IR: what `page_codes.unpack_rows` does for a cache."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from elastickv.backends.cpu.blocks.block_rows import SHORTS, switch, transposed
from elastickv.backends.cpu.intrinsics import (
    BF16,
    F32,
    FLOAT_BYTES,
    FORMAT_CODES,
    I8,
    I16,
    I32,
    I64,
    LANES,
    VF,
    VI,
    addressed,
    load,
    loop,
    multiply_add,
    splat,
    store,
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
    WORDS,
)
from elastickv.recipe import PAGE_TOKENS

BYTES = ir.VectorType(I8, LANES)
E4M3_FACTOR = 256.0  # `widen_e4m3` gives 1/256 of the numbers
STORED = tuple(code for name, code in FORMAT_CODES.items() if name != "fp32")


def _packed(builder: ir.IRBuilder, words: Any, number: int, bits: int) -> Any:
    """Return code `number` of those in each 32-bit word, of 4 or 2 bits, as float32."""

    def every(value: int) -> Any:
        return ir.Constant(words.type, [value] * words.type.count)

    shifted = builder.lshr(words, every(16 * (number % 2) + bits * (number // 2)))
    return builder.sitofp(builder.and_(shifted, every((1 << bits) - 1)), ir.VectorType(F32, words.type.count))


def _triple(builder: ir.IRBuilder, packed: list[Any], number: int) -> Any:
    """Return code `number` of 32 of int3 in each column's three 32-bit words, as float32."""

    def bits(word: Any, first: int, mask: int) -> Any:
        first_bit, ones = (ir.Constant(word.type, [n] * word.type.count) for n in (first, mask))
        return builder.and_(builder.lshr(word, first_bit), ones)

    (word, place), half = divmod(number // 2, PAIRS_OF_WORD), 16 * (number % 2)
    if word < WORDS:
        code = bits(packed[word], half + 3 * place, 7)
    else:
        code = bits(packed[0], half + 15, 1)
        for i, left in enumerate(packed[1:], 1):
            code = builder.or_(code, builder.shl(bits(left, half + 15, 1), ir.Constant(left.type, [i] * left.type.count)))
    return builder.sitofp(code, ir.VectorType(F32, code.type.count))


def _pair(builder: ir.IRBuilder, address: Any, offset: Any) -> list[Any]:
    """Return the even and the odd ones of 32 signed bytes, as float32."""
    both = load(builder, address, ir.VectorType(I8, 2 * LANES), offset)
    orders = [ir.Constant(ir.VectorType(I32, LANES), list(range(first, 2 * LANES, 2))) for first in (0, 1)]
    return [builder.sitofp(builder.shuffle_vector(both, both, order), VF) for order in orders]


def _page_scale(builder: ir.IRBuilder, scales: Any) -> Any:
    """Return 256 x the scale of an fp8 page."""
    scale = widen_bf16(builder, load(builder, scales, ir.VectorType(I16, 1)))
    return splat(builder, builder.fmul(builder.extract_element(scale, I32(0)), F32(E4M3_FACTOR)))


def _floats(builder: ir.IRBuilder, fmt: int, address: Any, offset: Any, scale: Any) -> Any:
    """Return 16 numbers of fp8, bf16 or fp16."""
    if fmt == FP8:
        return builder.fmul(widen_e4m3(builder, load(builder, address, BYTES, offset)), scale)
    return (widen_bf16 if fmt == BF16 else widen_fp16)(builder, load(builder, address, SHORTS, builder.mul(offset, I64(2))))


def _channels(
    builder: ir.IRBuilder,
    fmt: int,
    codes: Any,
    scales: Any,
    bounds: Any,
    dim: Any,
    first: Any,
    part: int,
    token: Any,
    scale: Any,
) -> list[Any]:
    """Return the numbers of 16 channels from `first` on, of 16 tokens; `part`: of int3, the first one's place among 32."""
    if fmt in (*FEW_BITS, INT8_PER_CHANNEL):
        at = builder.mul(first, I64(2))
        steps, zeros = (
            widen_fp16(builder, load(builder, bounds, SHORTS, offset))
            for offset in (at, builder.add(at, builder.mul(dim, I64(2))))
        )
    if fmt == INT3:
        row = builder.add(builder.mul(builder.udiv(first, I64(ROWS)), I64(WORDS * PAGE_TOKENS)), token)
        packed = [load(builder, codes, VI, builder.mul(builder.add(row, I64(n * PAGE_TOKENS)), I64(4))) for n in range(WORDS)]
        numbers = []
        for number in range(LANES):
            step, zero = (splat(builder, builder.extract_element(of, I32(number))) for of in (steps, zeros))
            numbers.append(multiply_add(builder, _triple(builder, packed, part + number), step, zero))
        return numbers
    if fmt in (INT4, INT2):
        bits, numbers = 4 if fmt == INT4 else 2, []
        of_word = 32 // bits
        for start in range(0, LANES, of_word):
            row = builder.add(builder.mul(builder.add(first, I64(start)), I64(PAGE_TOKENS // of_word)), token)
            packed = load(builder, codes, VI, builder.mul(row, I64(4)))
            for number in range(of_word):
                step, zero = (splat(builder, builder.extract_element(of, I32(start + number))) for of in (steps, zeros))
                numbers.append(multiply_add(builder, _packed(builder, packed, number, bits), step, zero))
        return numbers
    rows = [builder.add(builder.mul(builder.add(first, I64(i)), I64(PAGE_TOKENS)), token) for i in range(LANES)]
    if fmt == INT8_PER_CHANNEL:
        numbers = []
        for number, row in enumerate(rows):
            step, zero = (splat(builder, builder.extract_element(of, I32(number))) for of in (steps, zeros))
            codes_of = builder.uitofp(load(builder, codes, BYTES, row), VF)
            numbers.append(multiply_add(builder, codes_of, step, zero))
        return numbers
    if fmt == INT8:
        steps = widen_bf16(builder, load(builder, scales, SHORTS, builder.mul(token, I64(2))))
        pairs = (_pair(builder, codes, builder.add(row, token)) for row in rows[::2])
        return [builder.fmul(number, steps) for pair in pairs for number in pair]
    return [_floats(builder, fmt, codes, row, scale) for row in rows]


def _keys(builder: ir.IRBuilder, fmt: Any, codes: Any, scales: Any, bounds: Any, dim: Any, target: Any) -> None:
    def body(code: int) -> Callable[[], None]:
        def emit() -> None:
            scale = _page_scale(builder, scales) if code == FP8 else None
            with loop(builder, I64(PAGE_TOKENS // LANES), []) as (half, _, _):
                token = builder.mul(half, I64(LANES))
                at_once = ROWS if code == INT3 else LANES
                with loop(builder, builder.sdiv(builder.add(dim, I64(at_once - 1)), I64(at_once)), []) as (index, _, _):
                    for part in range(0, at_once, LANES):
                        first = builder.add(builder.mul(index, I64(at_once)), I64(part))
                        with builder.if_then(builder.icmp_signed("<", first, dim)):
                            tile = _channels(builder, code, codes, scales, bounds, dim, first, part, token, scale)
                            for number, row in enumerate(transposed(builder, tile)):
                                at = builder.add(builder.mul(builder.add(token, I64(number)), dim), first)
                                store(builder, row, target, builder.mul(at, I64(FLOAT_BYTES)))

        return emit

    switch(builder, fmt, {code: body(code) for code in STORED})


# (format, codes, scales, bounds, head_dim, target): the keys of a page as 32 rows of float32.
dequantize_keys = addressed(6, types.void, _keys)


def _token_scale(builder: ir.IRBuilder, scales: Any, token: Any, offset: int = 0) -> Any:
    """Return a bfloat16 of a token, as float32."""
    bits = load(builder, scales, ir.VectorType(I16, 1), builder.add(builder.mul(token, I64(2)), I64(offset)))
    return builder.extract_element(widen_bf16(builder, bits), I32(0))


def _rows_of_words(
    builder: ir.IRBuilder, bits: int, codes: Any, scales: Any, dim: Any, start: Any, columns: Any, target: Any
) -> None:
    """Write `columns` channels, a multiple of eight; `start` is the first, and `codes` has the chunk in int4 or int2."""
    words, rows = ir.VectorType(I32, EIGHT), 32 // bits
    turns = builder.sdiv(columns, I64(EIGHT))
    with loop(builder, I64(PAGE_TOKENS // rows), []) as (word, _, _), loop(builder, turns, []) as (index, _, _):
        column = builder.mul(index, I64(EIGHT))
        packed = load(builder, codes, words, builder.mul(builder.add(builder.mul(word, columns), column), I64(4)))
        for number in range(rows):
            token = builder.add(builder.mul(word, I64(rows)), I64(number))
            step, zero = (splat(builder, _token_scale(builder, scales, token, n), EIGHT) for n in (0, 2 * PAGE_TOKENS))
            x = builder.fadd(builder.fmul(_packed(builder, packed, number, bits), step), zero)
            at = builder.add(builder.mul(token, dim), builder.add(start, column))
            store(builder, x, target, builder.mul(at, I64(FLOAT_BYTES)))


def _three_bits(builder: ir.IRBuilder, codes: Any, scales: Any, dim: Any, start: Any, columns: Any, target: Any) -> None:
    """Do what `_rows_of_words` does, for int3."""
    words = ir.VectorType(I32, EIGHT)
    with loop(builder, builder.sdiv(columns, I64(EIGHT)), []) as (index, _, _):
        column = builder.mul(index, I64(EIGHT))
        rows = [builder.add(builder.mul(columns, I64(number)), column) for number in range(WORDS)]
        packed = [load(builder, codes, words, builder.mul(row, I64(4))) for row in rows]
        for number in range(PAGE_TOKENS):
            token = I64(number)
            step, zero = (splat(builder, _token_scale(builder, scales, token, n), EIGHT) for n in (0, 2 * PAGE_TOKENS))
            x = builder.fadd(builder.fmul(_triple(builder, packed, number), step), zero)
            at = builder.add(builder.mul(token, dim), builder.add(start, column))
            store(builder, x, target, builder.mul(at, I64(FLOAT_BYTES)))


def _other(builder: ir.IRBuilder, fmt: int, codes: Any, scales: Any, dim: Any, start: Any, columns: Any, target: Any) -> None:
    """Write `columns` channels, a multiple of 16."""
    scale = _page_scale(builder, scales) if fmt == FP8 else None
    at_once = 2 if fmt == INT8 else 1
    with loop(builder, I64(PAGE_TOKENS // at_once), []) as (row, _, _):
        tokens = [builder.add(builder.mul(row, I64(at_once)), I64(i)) for i in range(at_once)]
        steps = [splat(builder, _token_scale(builder, scales, token)) for token in tokens] if fmt == INT8 else []
        with loop(builder, builder.sdiv(columns, I64(LANES)), []) as (index, _, _):
            column = builder.mul(index, I64(LANES))
            offset = builder.add(builder.mul(row, columns), column)
            if fmt == INT8:
                pair = _pair(builder, codes, builder.mul(offset, I64(2)))
                numbers = [builder.fmul(x, step) for x, step in zip(pair, steps, strict=True)]
            else:
                numbers = [_floats(builder, fmt, codes, offset, scale)]
            for token, x in zip(tokens, numbers, strict=True):
                at = builder.add(builder.mul(token, dim), builder.add(start, column))
                store(builder, x, target, builder.mul(at, I64(FLOAT_BYTES)))


def _values(builder: ir.IRBuilder, fmt: Any, codes: Any, scales: Any, dim: Any, start: Any, columns: Any, target: Any) -> None:
    def body(code: int) -> Callable[[], None]:
        if code == INT3:
            return lambda: _three_bits(builder, codes, scales, dim, start, columns, target)
        if code in FEW_BITS:
            return lambda: _rows_of_words(builder, 4 if code == INT4 else 2, codes, scales, dim, start, columns, target)
        return lambda: _other(builder, code, codes, scales, dim, start, columns, target)

    switch(builder, fmt, {code: body(code) for code in STORED if code != INT8_PER_CHANNEL})


# (format, the codes of a chunk, its scales, head_dim, first channel, channels, target): a chunk of the values of a page, in 32
# rows of float32.
dequantize_values = addressed(7, types.void, _values)
