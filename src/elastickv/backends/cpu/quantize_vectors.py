"""The quantizers of a page in vector IR: eight elements at a time, because every group of channels is a multiple of eight.

A plane of exact numbers is seen as rows: of K one for each channel, of its 32 tokens; of V one for each token, of its channels.
Codes and scales equal those of `elastickv.kvcache.quantize` bit for bit. A NaN does not count for the range that it shares.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types

from elastickv.backends.cpu.intrinsics import (
    COLUMNS,
    F32,
    FP16,
    FP32,
    I8,
    I16,
    I32,
    I64,
    addressed,
    call,
    constant,
    larger,
    load,
    loop,
    reduce,
    splat,
    store,
    widen_bf16,
    widen_fp16,
)
from elastickv.recipe import PAGE_TOKENS

UNIT = 8
NUMBERS, WORDS = ir.VectorType(F32, UNIT), ir.VectorType(I32, UNIT)
SHORTS, BYTES = ir.VectorType(I16, UNIT), ir.VectorType(I8, UNIT)
MAGIC = 12582912.0  # 1.5 x 2^23: the sum ends in the whole number, rounded half to even
INFINITY = float("inf")
LEAST_NORMAL_E4M3, STEPS_E4M3 = 2.0**-6, 512.0


def _every(value: int) -> Any:
    return ir.Constant(WORDS, [value] * UNIT)


@dataclass(frozen=True)
class ExactPlane:
    """K or V of an exact page: `code` is its format, known when the kernel runs."""

    builder: ir.IRBuilder
    code: Any
    address: Any
    dim: Any
    is_value: bool

    def unit(self, row: Any, column: Any) -> Any:
        """Return eight numbers of a row, from `column` on, as float32."""
        builder = self.builder
        if self.is_value:
            start, columns = chunk(builder, self.dim, column)
            first = builder.add(builder.mul(start, I64(PAGE_TOKENS)), builder.mul(row, columns))
            return self.numbers(builder.add(first, builder.sub(column, start)))
        return self.numbers(builder.add(builder.mul(row, I64(PAGE_TOKENS)), column))

    def numbers(self, index: Any) -> Any:
        """Return eight numbers of the plane, from number `index` on, as float32."""
        builder = self.builder
        short, joined = builder.mul(index, I64(2)), builder.append_basic_block("exact")
        wide, half, brain = (builder.append_basic_block(f"exact.{name}") for name in ("fp32", "fp16", "bf16"))
        switch = builder.switch(self.code, brain)
        switch.add_case(I64(FP32), wide)
        switch.add_case(I64(FP16), half)
        loaded = []
        for block, convert in (
            (wide, lambda: load(builder, self.address, NUMBERS, builder.mul(index, I64(4)))),
            (half, lambda: widen_fp16(builder, load(builder, self.address, SHORTS, short))),
            (brain, lambda: widen_bf16(builder, load(builder, self.address, SHORTS, short))),
        ):
            builder.position_at_end(block)
            loaded.append((convert(), builder.block))
            builder.branch(joined)
        builder.position_at_end(joined)
        value = builder.phi(NUMBERS)
        for number, block in loaded:
            value.add_incoming(number, block)
        return value


def chunk(builder: ir.IRBuilder, dim: Any, column: Any) -> tuple[Any, Any]:
    """Return the first channel of V's chunk that holds `column`, and the chunk's columns."""
    start = builder.and_(column, I64(-COLUMNS))
    rest = builder.sub(dim, start)
    return start, builder.select(builder.icmp_signed("<", rest, I64(COLUMNS)), rest, I64(COLUMNS))


def _smaller(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _size(builder: ir.IRBuilder, x: Any) -> Any:
    return call(builder, f"llvm.fabs.v{UNIT}f32", NUMBERS, x)


def _rounded(builder: ir.IRBuilder, x: Any, kind: Any) -> Any:
    """Return numbers rounded half to even, as integers of up to 16 bits."""
    return builder.trunc(builder.bitcast(builder.fadd(x, constant(MAGIC, UNIT)), WORDS), kind)


def _interleaved(builder: ir.IRBuilder, first: Any, second: Any) -> Any:
    order = [index for pair in zip(range(UNIT), range(UNIT, 2 * UNIT), strict=True) for index in pair]
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, 2 * UNIT), order))


def _symmetric_scales(builder: ir.IRBuilder, peak: Any, levels: Any) -> tuple[Any, Any]:
    """Return the bfloat16 bits of peaks / levels rounded up, and the scales as float32."""
    step = builder.fdiv(peak, splat(builder, levels, UNIT))
    bits = builder.lshr(builder.add(builder.bitcast(step, WORDS), _every(0xFFFF)), _every(16))
    return builder.trunc(bits, SHORTS), builder.bitcast(builder.shl(bits, _every(16)), NUMBERS)


def _symmetric_codes(builder: ir.IRBuilder, x: Any, divisor: Any) -> Any:
    codes = _rounded(builder, builder.fdiv(x, divisor), BYTES)
    return builder.select(builder.fcmp_ordered(">", divisor, constant(0.0, UNIT)), codes, ir.Constant(BYTES, [0] * UNIT))


def _symmetric_keys(builder: ir.IRBuilder, code: Any, source: Any, dim: Any, target: Any, scales: Any, levels: Any) -> None:
    plane = ExactPlane(builder, code, source, dim, False)
    with loop(builder, I64(PAGE_TOKENS // UNIT), []) as (unit, _, _):
        token = builder.mul(unit, I64(UNIT))
        with loop(builder, dim, [constant(0.0, UNIT)]) as (d, peaks, final):
            peaks[0] = larger(builder, _size(builder, plane.unit(d, token)), peaks[0])
        bits, divisor = _symmetric_scales(builder, final[0], levels)
        store(builder, bits, scales, builder.mul(token, I64(2)))
        with loop(builder, builder.sdiv(dim, I64(2)), []) as (pair, _, _):
            d = builder.mul(pair, I64(2))
            even, odd = (_symmetric_codes(builder, plane.unit(builder.add(d, I64(i)), token), divisor) for i in (0, 1))
            where = builder.mul(builder.add(builder.mul(pair, I64(PAGE_TOKENS)), token), I64(2))
            store(builder, _interleaved(builder, even, odd), target, where)


def _symmetric_values(builder: ir.IRBuilder, code: Any, source: Any, dim: Any, target: Any, scales: Any, levels: Any) -> None:
    plane, units = ExactPlane(builder, code, source, dim, True), builder.sdiv(dim, I64(UNIT))
    with loop(builder, I64(PAGE_TOKENS // 2), []) as (pair, _, _):
        tokens, divisors = [builder.add(builder.mul(pair, I64(2)), I64(i)) for i in (0, 1)], []
        for token in tokens:
            with loop(builder, units, [constant(0.0, UNIT)]) as (unit, peaks, final):
                x = plane.unit(token, builder.mul(unit, I64(UNIT)))
                peaks[0] = larger(builder, _size(builder, x), peaks[0])
            peak = reduce(builder, final[0], lambda a, b: larger(builder, a, b))
            bits, divisor = _symmetric_scales(builder, splat(builder, peak, UNIT), levels)
            store(builder, builder.extract_element(bits, I32(0)), scales, builder.mul(token, I64(2)))
            divisors.append(divisor)
        with loop(builder, units, []) as (unit, _, _):
            d = builder.mul(unit, I64(UNIT))
            start, columns = chunk(builder, dim, d)
            rows = zip(tokens, divisors, strict=True)
            even, odd = (_symmetric_codes(builder, plane.unit(token, d), divisor) for token, divisor in rows)
            within = builder.add(builder.mul(pair, columns), builder.sub(d, start))
            where = builder.add(builder.mul(start, I64(PAGE_TOKENS)), builder.mul(within, I64(2)))
            store(builder, _interleaved(builder, even, odd), target, where)


# (exact format, plane, head_dim, codes, scales, levels): K and V of a page in 8 bits, from -levels to levels, with a bfloat16
# scale for each token.
symmetric_keys = addressed(5, types.void, _symmetric_keys, floats=1)
symmetric_values = addressed(5, types.void, _symmetric_values, floats=1)


def _range(is_value: bool) -> Callable[..., Any]:
    def body(builder: ir.IRBuilder, code: Any, source: Any, dim: Any, row: Any, first: Any, columns: Any) -> Any:
        plane = ExactPlane(builder, code, source, dim, is_value)
        starts = [constant(INFINITY, UNIT), constant(-INFINITY, UNIT)]
        with loop(builder, builder.sdiv(columns, I64(UNIT)), starts) as (unit, ends, final):
            x = plane.unit(row, builder.add(first, builder.mul(unit, I64(UNIT))))
            ends[0], ends[1] = _smaller(builder, x, ends[0]), larger(builder, x, ends[1])
        least = reduce(builder, final[0], lambda a, b: _smaller(builder, a, b))
        greatest = reduce(builder, final[1], lambda a, b: larger(builder, a, b))
        low, high = (builder.zext(builder.bitcast(end, I32), I64) for end in (least, greatest))
        return builder.or_(low, builder.shl(high, I64(32)))

    return body


# (exact format, plane, head_dim, row, first column, columns): the bits of the least number, and above them of the greatest.
range_of_keys = addressed(6, types.int64, _range(False))
range_of_values = addressed(6, types.int64, _range(True))


def _affine_codes(builder: ir.IRBuilder, x: Any, scale: Any, zero: Any, most: Any) -> Any:
    steps = builder.fdiv(builder.fsub(x, splat(builder, zero, UNIT)), splat(builder, scale, UNIT))
    codes = _rounded(builder, builder.select(builder.fcmp_ordered("<", most, steps), most, steps), SHORTS)
    usable = splat(builder, builder.fcmp_ordered(">", scale, F32(0.0)), UNIT)
    positive = builder.and_(usable, builder.fcmp_ordered(">", steps, constant(0.0, UNIT)))
    return builder.select(positive, codes, ir.Constant(SHORTS, [0] * UNIT))


def _rows_of_word(is_value: bool, bits: int) -> Callable[..., None]:
    widen, rows = widen_bf16 if is_value else widen_fp16, 32 // bits

    def body(
        builder: ir.IRBuilder,
        code: Any,
        source: Any,
        dim: Any,
        row: Any,
        first: Any,
        columns: Any,
        scales: Any,
        zeros: Any,
        target: Any,
        levels: Any,
    ) -> None:
        plane, most = ExactPlane(builder, code, source, dim, is_value), splat(builder, levels, UNIT)
        wide = [
            [widen(builder, load(builder, address, SHORTS, 2 * some)) for address in (scales, zeros)]
            for some in range(0, rows, UNIT)
        ]
        with loop(builder, builder.sdiv(columns, I64(UNIT)), []) as (unit, _, _):
            after = builder.mul(unit, I64(UNIT))
            words = [ir.Constant(SHORTS, [0] * UNIT)] * 2
            for number in range(rows):
                scale, zero = (builder.extract_element(part, I32(number % UNIT)) for part in wide[number // UNIT])
                x = plane.unit(builder.add(row, I64(number)), builder.add(first, after))
                shift = ir.Constant(SHORTS, [bits * (number // 2)] * UNIT)
                field = builder.shl(_affine_codes(builder, x, scale, zero, most), shift)
                words[number % 2] = builder.or_(words[number % 2], field)
            store(builder, _interleaved(builder, *words), target, builder.mul(after, I64(4)))

    return body


# (exact format, plane, head_dim, first row, first column, columns, scales, zeros, codes, levels): eight rows in 4 bits or 16 in
# 2 bits, from 0 to levels, each with a scale and a zero of 16 bits: halves for K, bfloat16 for V.
four_bit_keys = addressed(9, types.void, _rows_of_word(False, 4), floats=1)
four_bit_values = addressed(9, types.void, _rows_of_word(True, 4), floats=1)
two_bit_keys = addressed(9, types.void, _rows_of_word(False, 2), floats=1)
two_bit_values = addressed(9, types.void, _rows_of_word(True, 2), floats=1)


def _thirty_two_rows(is_value: bool) -> Callable[..., None]:
    widen, one = widen_bf16 if is_value else widen_fp16, ir.VectorType(I16, 1)

    def body(
        builder: ir.IRBuilder,
        code: Any,
        source: Any,
        dim: Any,
        row: Any,
        first: Any,
        columns: Any,
        scales: Any,
        zeros: Any,
        target: Any,
        levels: Any,
    ) -> None:
        plane, most = ExactPlane(builder, code, source, dim, is_value), splat(builder, levels, UNIT)
        rows = builder.sub(I64(PAGE_TOKENS) if is_value else dim, row)

        def codes(number: Any, column: Any) -> Any:
            exists = builder.icmp_signed("<", number, rows)
            used = builder.select(exists, number, I64(0))
            at = builder.mul(used, I64(2))
            numbers = (widen(builder, load(builder, address, one, at)) for address in (scales, zeros))
            scale, zero = (builder.extract_element(number, I32(0)) for number in numbers)
            chosen = _affine_codes(builder, plane.unit(builder.add(row, used), column), scale, zero, most)
            return builder.select(splat(builder, exists, UNIT), chosen, ir.Constant(SHORTS, [0] * UNIT))

        def shift(bits: Any) -> Any:
            return splat(builder, builder.trunc(bits, I16), UNIT)

        with loop(builder, builder.sdiv(columns, I64(UNIT)), []) as (unit, _, _):
            after = builder.mul(unit, I64(UNIT))
            column = builder.add(first, after)
            last = [codes(I64(30 + half), column) for half in (0, 1)]
            with loop(builder, I64(3), []) as (word, _, _):
                top = ir.Constant(SHORTS, [15] * UNIT)
                left = [builder.shl(builder.lshr(each, shift(word)), top) for each in last]
                with loop(builder, I64(5), left) as (pair, halves, final):
                    number = builder.mul(builder.add(builder.mul(word, I64(5)), pair), I64(2))
                    for half in (0, 1):
                        code_of = codes(builder.add(number, I64(half)), column)
                        halves[half] = builder.or_(halves[half], builder.shl(code_of, shift(builder.mul(pair, I64(3)))))
                at = builder.mul(builder.add(builder.mul(word, columns), after), I64(4))
                store(builder, _interleaved(builder, *final), target, at)

    return body


# (exact format, plane, head_dim, first row, first column, columns, scales, zeros, codes, levels): 32 rows in 3 bits, from 0 to
# levels, each with a scale and a zero of 16 bits, as above. Rows beyond the last channel of K have codes of 0.
three_bit_keys = addressed(9, types.void, _thirty_two_rows(False), floats=1)
three_bit_values = addressed(9, types.void, _thirty_two_rows(True), floats=1)


def _channel_rows(
    builder: ir.IRBuilder, code: Any, source: Any, dim: Any, first: Any, scales: Any, zeros: Any, target: Any, levels: Any
) -> None:
    plane, most = ExactPlane(builder, code, source, dim, False), splat(builder, levels, UNIT)
    wide = [widen_fp16(builder, load(builder, address, SHORTS)) for address in (scales, zeros)]
    with loop(builder, I64(PAGE_TOKENS // UNIT), []) as (unit, _, _):
        token = builder.mul(unit, I64(UNIT))
        for number in range(UNIT):
            scale, zero = (builder.extract_element(plane_of, I32(number)) for plane_of in wide)
            codes = _affine_codes(builder, plane.unit(builder.add(first, I64(number)), token), scale, zero, most)
            store(builder, builder.trunc(codes, BYTES), target, builder.add(token, I64(number * PAGE_TOKENS)))


# (exact format, plane, head_dim, first channel, scales, zeros, codes, levels): eight channels of K's page in 8 bits, from 0 to
# levels, each with a half scale and zero.
channel_keys = addressed(7, types.void, _channel_rows, floats=1)


def _e4m3(builder: ir.IRBuilder, x: Any, most: Any) -> Any:
    """Return the bits of float8 e4m3, ties to even; larger numbers become `most`."""
    bits = builder.bitcast(x, WORDS)
    size = _size(builder, x)
    magnitude = _smaller(builder, size, most)
    small = builder.and_(
        builder.bitcast(
            builder.fadd(builder.fmul(magnitude, constant(STEPS_E4M3, UNIT)), constant(MAGIC, UNIT)),
            WORDS,
        ),
        _every(0xFF),
    )
    exponent = builder.bitcast(magnitude, WORDS)
    odd = builder.and_(builder.lshr(exponent, _every(20)), _every(1))
    large = builder.lshr(builder.add(builder.add(exponent, _every(0x7FFFF)), odd), _every(20))
    large = builder.sub(large, _every(120 << 3))
    subnormal = builder.fcmp_ordered("<", magnitude, constant(LEAST_NORMAL_E4M3, UNIT))
    code = builder.select(subnormal, small, large)
    code = builder.select(builder.fcmp_unordered("uno", x, x), _every(0x7F), code)
    sign = builder.and_(builder.lshr(bits, _every(24)), _every(0x80))
    return builder.trunc(builder.or_(sign, code), BYTES)


def _float_page(builder: ir.IRBuilder, code: Any, source: Any, dim: Any, target: Any, scales: Any, most: Any) -> None:
    plane = ExactPlane(builder, code, source, dim, False)
    units = builder.mul(dim, I64(PAGE_TOKENS // UNIT))
    with loop(builder, units, [constant(0.0, UNIT)]) as (unit, peaks, final):
        x = plane.numbers(builder.mul(unit, I64(UNIT)))
        peaks[0] = larger(builder, _size(builder, x), peaks[0])
    peak = reduce(builder, final[0], lambda a, b: larger(builder, a, b))
    step = builder.bitcast(builder.fdiv(peak, most), I32)
    power = builder.and_(builder.add(step, I32(0x7FFFFF)), I32(0x7F800000))
    store(builder, builder.trunc(builder.lshr(power, I32(16)), I16), scales)
    divisor = splat(builder, builder.bitcast(power, F32), UNIT)
    used = builder.fcmp_ordered(">", divisor, constant(0.0, UNIT))
    with loop(builder, units, []) as (unit, _, _):
        index = builder.mul(unit, I64(UNIT))
        scaled = builder.fdiv(plane.numbers(index), divisor)
        scaled = builder.select(used, scaled, constant(0.0, UNIT))
        store(builder, _e4m3(builder, scaled, splat(builder, most, UNIT)), target, index)


# (exact format, plane, head_dim, codes, scale, largest): K or V of a page in float8 e4m3, in the order of the exact numbers,
# with a power of two as its bfloat16 scale.
float_page = addressed(5, types.void, _float_page, floats=1)
