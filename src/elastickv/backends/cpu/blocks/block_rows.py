"""Rows of keys and values as an engine stores them, moved to and from pages: vector IR.

Rows have a multiple of 16 elements. Elements of a float format are copied as bits.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from elastickv.backends.cpu.intrinsics import (
    BF16,
    FLOAT_BYTES,
    FORMAT_CODES,
    FP16,
    FP32,
    HALF_IN_HARDWARE,
    I16,
    I32,
    I64,
    LANES,
    VF,
    VI,
    addressed,
    call,
    constant,
    load,
    loop,
    splat,
    store,
    widen_bf16,
    widen_fp16,
)
from elastickv.kvcache.rounding import LARGEST
from elastickv.recipe import PAGE_TOKENS

COPIED_BYTES = 32
SHORTS = ir.VectorType(I16, LANES)
NAMES = {code: name for name, code in FORMAT_CODES.items()}
PIECE = ir.VectorType(I64, COPIED_BYTES // 8)


def switch(builder: ir.IRBuilder, code: Any, bodies: dict[int, Callable[[], None]]) -> None:
    """Run the body of the case that `code` is."""
    end = builder.append_basic_block("rows.done")
    switch = builder.switch(code, end)
    for number, body in bodies.items():
        block = builder.append_basic_block(f"rows.{number}")
        switch.add_case(I64(number), block)
        builder.position_at_end(block)
        body()
        builder.branch(end)
    builder.position_at_end(end)


def _copy(builder: ir.IRBuilder, source: Any, target: Any, n_bytes: Any) -> None:
    with loop(builder, builder.sdiv(n_bytes, I64(COPIED_BYTES)), []) as (index, _, _):
        where = builder.mul(index, I64(COPIED_BYTES))
        store(builder, load(builder, source, PIECE, where), target, where)


# (source, target, bytes): a multiple of 32.
copy_bytes = addressed(3, types.void, _copy)


def transposed(builder: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """Return 16 vectors of 16 lanes transposed: four perfect shuffles move a lane's number to the vector's."""
    orders = []
    for first in (0, LANES // 2):
        order = [lane for pair in range(first, first + LANES // 2) for lane in (pair, LANES + pair)]
        orders.append(ir.Constant(ir.VectorType(I32, LANES), order))
    for _ in range(4):
        pairs = zip(rows[: LANES // 2], rows[LANES // 2 :], strict=True)
        rows = [builder.shuffle_vector(a, b, order) for a, b in pairs for order in orders]
    return rows


def _transpose_keys(builder: ir.IRBuilder, size: Any, addresses: Any, dim: Any, target: Any) -> None:
    def body(kind: Any, element: int) -> Callable[[], None]:
        def emit() -> None:
            sources = [load(builder, addresses, I64, 8 * row) for row in range(LANES)]
            with loop(builder, builder.sdiv(dim, I64(LANES)), []) as (index, _, _):
                column = builder.mul(index, I64(LANES * element))
                rows = [load(builder, source, kind, column) for source in sources]
                first = builder.mul(column, I64(PAGE_TOKENS))
                for number, row in enumerate(transposed(builder, rows)):
                    store(builder, row, target, builder.add(first, I64(number * PAGE_TOKENS * element)))

        return emit

    switch(builder, size, {2: body(SHORTS, 2), 4: body(VI, 4)})


# (bytes of an element, address of the addresses of 16 rows, head_dim, target): writes keys into 16 columns of a page of exact
# numbers, of which `target` is the first.
transpose_keys = addressed(4, types.void, _transpose_keys)


def _widen(builder: ir.IRBuilder, code: Any, source: Any, count: Any, target: Any, factor: Any) -> None:
    def body(fmt: int) -> Callable[[], None]:
        def emit() -> None:
            factors = splat(builder, factor)
            with loop(builder, builder.sdiv(count, I64(LANES)), []) as (index, _, _):
                wide = builder.mul(index, I64(LANES * FLOAT_BYTES))
                if fmt == FP32:
                    x = load(builder, source, VF, wide)
                else:
                    bits = load(builder, source, SHORTS, builder.mul(index, I64(LANES * 2)))
                    x = (widen_bf16 if fmt == BF16 else widen_fp16)(builder, bits)
                store(builder, builder.fmul(x, factors), target, wide)

        return emit

    switch(builder, code, {fmt: body(fmt) for fmt in (FP32, FP16, BF16)})


# (float format, source, count, target, factor): target = factor x source in float32.
widen_row = addressed(4, types.void, _widen, floats=1)


def bf16_rounded(builder: ir.IRBuilder, x: Any) -> Any:
    """Return the bits of 16 float32s rounded to bfloat16, ties to even; NaN stays NaN."""

    def every(value: int) -> Any:
        return ir.Constant(VI, [value] * LANES)

    bits = builder.bitcast(x, VI)
    odd = builder.and_(builder.lshr(bits, every(16)), every(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, every(0x7FFF))), every(16))
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", x, x), every(0x7FC0), rounded), SHORTS)


def fp16_rounded(builder: ir.IRBuilder, x: Any) -> Any:
    """Return the bits of 16 float32s rounded to half precision, as `elements.fp16_bits` does."""
    if HALF_IN_HARDWARE:
        return builder.bitcast(builder.fptrunc(x, ir.VectorType(ir.HalfType(), LANES)), SHORTS)

    def every(value: int) -> Any:
        return ir.Constant(VI, [value] * LANES)

    bits = builder.bitcast(x, VI)
    sign, magnitude = builder.and_(builder.lshr(bits, every(16)), every(0x8000)), builder.and_(bits, every(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, every(13)), every(1))
    normal = builder.lshr(builder.add(builder.sub(magnitude, every(0x38000000 - 0xFFF)), odd), every(13))
    # Adding 0.5 leaves the half's subnormal bits at the bottom, rounded by the processor.
    shifted = builder.bitcast(builder.fadd(builder.bitcast(magnitude, VF), constant(0.5)), VI)
    small = builder.sub(shifted, every(0x3F000000))
    half = builder.select(builder.icmp_signed("<", magnitude, every(0x38800000)), small, normal)
    half = builder.select(builder.icmp_signed(">=", magnitude, every(0x47800000)), every(0x7C00), half)
    half = builder.select(builder.icmp_signed(">", magnitude, every(0x7F800000)), every(0x7E00), half)
    return builder.trunc(builder.or_(sign, half), SHORTS)


def _limited(builder: ir.IRBuilder, x: Any, most: float) -> Any:
    """Return finite numbers beyond the largest one as that."""
    size = call(builder, f"llvm.fabs.v{LANES}f32", VF, x)
    beyond = builder.and_(
        builder.fcmp_ordered(">", size, constant(most)), builder.fcmp_ordered("<", size, constant(float("inf")))
    )
    return builder.select(beyond, call(builder, f"llvm.copysign.v{LANES}f32", VF, constant(most), x), x)


def _narrow(builder: ir.IRBuilder, code: Any, source: Any, count: Any, target: Any, factor: Any) -> None:
    round_to = {FP16: fp16_rounded, BF16: bf16_rounded}

    def body(fmt: int) -> Callable[[], None]:
        def emit() -> None:
            factors = splat(builder, factor)
            with loop(builder, builder.sdiv(count, I64(LANES)), []) as (index, _, _):
                wide = builder.mul(index, I64(LANES * FLOAT_BYTES))
                x = builder.fmul(load(builder, source, VF, wide), factors)
                if fmt == FP32:
                    store(builder, x, target, wide)
                else:
                    bits = round_to[fmt](builder, _limited(builder, x, LARGEST[NAMES[fmt]]))
                    store(builder, bits, target, builder.mul(index, I64(LANES * 2)))

        return emit

    switch(builder, code, {fmt: body(fmt) for fmt in (FP32, FP16, BF16)})


# (float format, float32 source, count, target, factor): target = factor x source, rounded; what is finite stays so.
narrow_row = addressed(4, types.void, _narrow, floats=1)
