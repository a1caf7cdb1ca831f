"""Slabs as float32 numbers, in vector IR: as rows, which `page_codes.unpack_rows` makes of a cache's pages, or as a page."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from elastickv.backends.cpu import layout
from elastickv.backends.cpu.blocks.block_rows import SHORTS, switch, transposed
from elastickv.backends.cpu.elements import key_plane_bytes, plane_bytes, scale_bytes, scale_group
from elastickv.backends.cpu.intrinsics import (
    BF16,
    COLUMNS,
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
    words,
)
from elastickv.backends.cpu.numba_cache import kernel
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

_F = layout.BufferField
DIM, VALUE_GROUP = int(_F.DIM), int(_F.VALUE_GROUP)
COLD_KEY_FORMAT, COLD_VALUE_FORMAT = int(_F.COLD_KEY_FORMAT), int(_F.COLD_VALUE_FORMAT)
BYTES = ir.VectorType(I8, LANES)
E4M3_FACTOR = 256.0  # `widen_e4m3` gives 1/256 of the numbers
STORED = tuple(code for name, code in FORMAT_CODES.items() if name != "fp32")
Put = Callable[[Any, Any, Any], None]  # of (numbers, their token, the first one's channel)


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


def _is_set(builder: ir.IRBuilder, flag: Any) -> Any:
    return builder.icmp_signed("!=", flag, I64(0))


def _place(builder: ir.IRBuilder, token: Any, column: Any, dim: Any, as_page: Any) -> Any:
    """Return where a token's channels from `column` on are among values, in bytes: in its row, or in a chunk of a page."""
    chunk = builder.and_(column, I64(-COLUMNS))
    behind = builder.sub(dim, chunk)
    width = builder.select(builder.icmp_signed("<", behind, I64(COLUMNS)), behind, I64(COLUMNS))
    in_page = builder.add(builder.mul(chunk, I64(PAGE_TOKENS)), builder.sub(column, chunk))
    is_page = _is_set(builder, as_page)
    start, row = builder.select(is_page, in_page, column), builder.select(is_page, width, dim)
    return builder.mul(builder.add(start, builder.mul(token, row)), I64(FLOAT_BYTES))


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


def _keys(builder: ir.IRBuilder, fmt: Any, codes: Any, scales: Any, bounds: Any, dim: Any, target: Any, as_page: Any) -> None:
    def put(tile: list[Any], first: Any, token: Any) -> None:
        with builder.if_else(_is_set(builder, as_page)) as (page, rows):
            with page:
                for number, row in enumerate(tile):
                    at = builder.add(builder.mul(builder.add(first, I64(number)), I64(PAGE_TOKENS)), token)
                    store(builder, row, target, builder.mul(at, I64(FLOAT_BYTES)))
            with rows:
                for number, row in enumerate(transposed(builder, tile)):
                    at = builder.add(builder.mul(builder.add(token, I64(number)), dim), first)
                    store(builder, row, target, builder.mul(at, I64(FLOAT_BYTES)))

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
                            put(tile, first, token)

        return emit

    switch(builder, fmt, {code: body(code) for code in STORED})


# (format, codes, scales, bounds, head_dim, target, as a page): the keys of a slab in float32, 32 rows or as a page has them.
_dequantize_keys = addressed(7, types.void, _keys)


def _token_scale(builder: ir.IRBuilder, scales: Any, token: Any, offset: int = 0) -> Any:
    """Return a bfloat16 of a token, as float32."""
    bits = load(builder, scales, ir.VectorType(I16, 1), builder.add(builder.mul(token, I64(2)), I64(offset)))
    return builder.extract_element(widen_bf16(builder, bits), I32(0))


def _words(builder: ir.IRBuilder, bits: int, codes: Any, scales: Any, start: Any, columns: Any, put: Put) -> None:
    """Write `columns` channels, a multiple of eight; `start` is the first, and `codes` has the chunk in int4 or int2."""
    words, rows = ir.VectorType(I32, EIGHT), 32 // bits
    turns = builder.sdiv(columns, I64(EIGHT))
    with loop(builder, I64(PAGE_TOKENS // rows), []) as (word, _, _):
        tokens = [builder.add(builder.mul(word, I64(rows)), I64(number)) for number in range(rows)]
        steps, zeros = (
            [splat(builder, _token_scale(builder, scales, token, offset), EIGHT) for token in tokens]
            for offset in (0, 2 * PAGE_TOKENS)
        )
        with loop(builder, turns, []) as (index, _, _):
            column = builder.mul(index, I64(EIGHT))
            packed = load(builder, codes, words, builder.mul(builder.add(builder.mul(word, columns), column), I64(4)))
            for number, (token, step, zero) in enumerate(zip(tokens, steps, zeros, strict=True)):
                x = builder.fadd(builder.fmul(_packed(builder, packed, number, bits), step), zero)
                put(x, token, builder.add(start, column))


def _three_bits(builder: ir.IRBuilder, codes: Any, scales: Any, start: Any, columns: Any, put: Put) -> None:
    """Do what `_words` does, for int3."""
    words = ir.VectorType(I32, EIGHT)
    with loop(builder, builder.sdiv(columns, I64(EIGHT)), []) as (index, _, _):
        column = builder.mul(index, I64(EIGHT))
        rows = [builder.add(builder.mul(columns, I64(number)), column) for number in range(WORDS)]
        packed = [load(builder, codes, words, builder.mul(row, I64(4))) for row in rows]
        for number in range(PAGE_TOKENS):
            token = I64(number)
            step, zero = (splat(builder, _token_scale(builder, scales, token, n), EIGHT) for n in (0, 2 * PAGE_TOKENS))
            x = builder.fadd(builder.fmul(_triple(builder, packed, number), step), zero)
            put(x, token, builder.add(start, column))


def _other(builder: ir.IRBuilder, fmt: int, codes: Any, scales: Any, start: Any, columns: Any, put: Put) -> None:
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
                put(x, token, builder.add(start, column))


def _values(
    builder: ir.IRBuilder, fmt: Any, codes: Any, scales: Any, dim: Any, start: Any, columns: Any, target: Any, as_page: Any
) -> None:
    def put(x: Any, token: Any, column: Any) -> None:
        store(builder, x, target, _place(builder, token, column, dim, as_page))

    def body(code: int) -> Callable[[], None]:
        if code == INT3:
            return lambda: _three_bits(builder, codes, scales, start, columns, put)
        if code in FEW_BITS:
            return lambda: _words(builder, 4 if code == INT4 else 2, codes, scales, start, columns, put)
        return lambda: _other(builder, code, codes, scales, start, columns, put)

    switch(builder, fmt, {code: body(code) for code in STORED if code != INT8_PER_CHANNEL})


# (format, the codes of a chunk, its scales, head_dim, first channel, channels, target, as a page): a chunk of the values of a
# slab, in 32 rows of float32 or in a page.
_dequantize_values = addressed(8, types.void, _values)


@kernel("void(int64, int64, int64, int64, int64)")
def dequantize_slab(descriptor, slab, bounds, target, as_page):  # type: ignore[no-untyped-def]
    """Write the numbers of a slab in float32: 32 rows of keys and then 32 of values, or a page.

    `descriptor` is the address of `layout.BufferField`, `bounds` that of the scales of K's channels.
    """
    c = words(descriptor)
    key, value, dim = c[COLD_KEY_FORMAT], c[COLD_VALUE_FORMAT], c[DIM]
    codes, values = slab + key_plane_bytes(key, dim), target + PAGE_TOKENS * dim * FLOAT_BYTES
    key_scales = codes + plane_bytes(value, dim)
    scales = key_scales + scale_bytes(key, dim, dim, False)
    _dequantize_keys(key, slab, key_scales, bounds, dim, target, as_page)
    group = scale_group(value, dim, c[VALUE_GROUP])
    for start in range(0, dim, group):
        for column in range(start, start + group, COLUMNS):
            columns, chunk = min(COLUMNS, start + group - column), codes + plane_bytes(value, column)
            of_group = scales + start // group * 4 * PAGE_TOKENS
            _dequantize_values(value, chunk, of_group, dim, column, columns, values, as_page)
