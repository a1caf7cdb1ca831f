"""Numba intrinsics: memory by address, atomics, and the vector kernels of one page, emitted as LLVM vector IR.

Auto-vectorisation can't be relied on for 16-bit and 8-bit loads, so the inner loops are written for 16 lanes; LLVM legalises
them to whatever vectors the processor has.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import Parameter, Signature
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, config
from numba.extending import intrinsic

from elastickv.recipe.formats import FORMATS

# A function that kernels call: nothing calls it from Python or C.
inlined = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
FORMAT_CODES = {f.name: f.cpu_id for f in FORMATS.values() if f.cpu_id is not None}
FP32, FP16, BF16 = (FORMAT_CODES[name] for name in ("fp32", "fp16", "bf16"))
FLOAT_BYTES = 4
LANES = 16
COLUMNS = 32
HALVES = COLUMNS // LANES


def _features() -> dict[str, bool]:
    """Return the features that Numba compiles for: the host's, unless its environment variables name a processor."""
    if config.CPU_NAME is None and config.CPU_FEATURES is None:
        return dict(llvm.get_host_cpu_features())
    return {word[1:]: word[0] == "+" for word in (config.CPU_FEATURES or "").split(",") if word}


_HOST = _features()
_X86 = any(word in llvm.get_process_triple() for word in ("x86_64", "i386", "i686", "AMD64"))
HALF_IN_HARDWARE = not _X86 or bool(_HOST.get("f16c", False))
# 4 queries x 32 columns are 8 registers of 512 bits, or 16 of 256: all that AVX2 has. There, 2 at a time.
BLOCK = 4 if _HOST.get("avx512f", False) else 2
WIDTHS = (1, 2, 4)[: BLOCK // 2 + 1]

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
VF, VI = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


def splat(builder: ir.IRBuilder, scalar: Any, lanes: int = LANES) -> Any:
    """Return a vector of `lanes` copies of `scalar`."""
    vector = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def constant(value: float, lanes: int = LANES) -> Any:
    """Return a float vector of one value."""
    return ir.Constant(ir.VectorType(F32, lanes), [value] * lanes)


def at(builder: ir.IRBuilder, address: Any, kind: Any, offset: Any = 0) -> Any:
    """Return a pointer to `kind` at `address` + `offset` bytes."""
    where = builder.add(address, I64(offset) if isinstance(offset, int) else offset)
    return builder.inttoptr(where, kind.as_pointer())


def load(builder: ir.IRBuilder, address: Any, kind: Any, offset: Any = 0) -> Any:
    """Load `kind` from `address` + `offset` bytes, which need not be aligned beyond the element."""
    return builder.load(at(builder, address, kind, offset), align=1 if isinstance(kind, ir.VectorType) else None)


def store(builder: ir.IRBuilder, value: Any, address: Any, offset: Any = 0) -> None:
    """Store a vector or scalar at `address` + `offset` bytes."""
    vector = isinstance(value.type, ir.VectorType)
    builder.store(value, at(builder, address, value.type, offset), align=1 if vector else None)


def call(builder: ir.IRBuilder, name: str, result: Any, *args: Any) -> Any:
    """Call an LLVM intrinsic by name."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def multiply_add(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, fused where the processor can: `llvm.fma` would call libm where it can't."""
    return call(builder, f"llvm.fmuladd.v{LANES}f32", VF, a, b, c)


def prefetch(builder: ir.IRBuilder, address: Any, offset: Any) -> None:
    """Ask for the cache line at `address` + `offset` bytes; never faults."""
    call(builder, "llvm.prefetch.p0i8", ir.VoidType(), at(builder, address, I8, offset), I32(0), I32(3), I32(1))


def widen_bf16(builder: ir.IRBuilder, bits: Any) -> Any:
    """Return the float32 values of a vector of bfloat16s."""
    lanes = bits.type.count
    wide = ir.VectorType(I32, lanes)
    return builder.bitcast(builder.shl(builder.zext(bits, wide), ir.Constant(wide, [16] * lanes)), ir.VectorType(F32, lanes))


def widen_fp16(builder: ir.IRBuilder, bits: Any) -> Any:
    """Return the float32 values of halves; without F16C by moving the exponent, which a multiplication normalizes."""
    lanes = bits.type.count
    numbers, integers = ir.VectorType(F32, lanes), ir.VectorType(I32, lanes)
    if HALF_IN_HARDWARE:
        return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), lanes)), numbers)

    def every(value: int) -> Any:
        return ir.Constant(integers, [value] * lanes)

    wide = builder.zext(bits, integers)
    magnitude = builder.shl(builder.and_(wide, every(0x7FFF)), every(13))
    scaled = builder.bitcast(builder.fmul(builder.bitcast(magnitude, numbers), constant(2.0**112, lanes)), integers)
    special = builder.or_(magnitude, every(0x7F800000))
    large = builder.icmp_unsigned(">=", magnitude, every(0x7C00 << 13))
    sign = builder.shl(builder.and_(wide, every(0x8000)), every(16))
    return builder.bitcast(builder.or_(builder.select(large, special, scaled), sign), numbers)


def load_bf16(builder: ir.IRBuilder, address: Any, half: int) -> Any:
    """Load 16 bfloat16s, number `half` at an address, as float32."""
    return widen_bf16(builder, load(builder, address, ir.VectorType(I16, LANES), half * LANES * 2))


def widen_e4m3(builder: ir.IRBuilder, bits: Any) -> Any:
    """Return 2**-8 of the float32 values of 16 float8 e4m3s: their bits, moved, are halves."""
    wide = builder.sext(bits, ir.VectorType(I16, LANES))
    halves = builder.and_(builder.shl(wide, _every_16(7)), _every_16(-0x4001))
    return widen_fp16(builder, halves)


def _every_16(value: int) -> Any:
    return ir.Constant(ir.VectorType(I16, LANES), [value] * LANES)


def by_width(codes: Iterable[int], body: Any) -> Any:
    """Make `body(builder, code, width, args)` one function that chooses among codes and widths, its first two arguments."""

    def chosen(builder: ir.IRBuilder, code: Any, width: Any, *args: Any) -> None:
        end = builder.append_basic_block("page.end")
        switch = builder.switch(builder.add(builder.mul(code, I64(8)), width), end)
        for number in codes:
            for queries in WIDTHS:
                block = builder.append_basic_block(f"page.{number}.{queries}")
                switch.add_case(I64(number * 8 + queries), block)
                builder.position_at_end(block)
                body(builder, number, queries, args)
                builder.branch(end)
        builder.position_at_end(end)

    return chosen


def exp2(builder: ir.IRBuilder, x: Any) -> Any:
    """Return 2**x of 16 float32s that are at most 0, to 1e-7; below -126 it is 0; NaN stays NaN.

    Range reduction to [-0.5, 0.5] and the Taylor polynomial of 2**f to degree 7.
    """
    tiny = builder.fcmp_ordered("<", x, constant(-126.0))
    x = builder.select(tiny, constant(-126.0), x)
    magic = constant(12582912.0)  # 1.5 * 2**23: adding it rounds to whole numbers, half to even
    shifted = builder.fadd(x, magic)
    fraction = builder.fsub(x, builder.fsub(shifted, magic))
    result = constant(_TAYLOR[-1])
    for coefficient in reversed(_TAYLOR[:-1]):
        result = multiply_add(builder, result, fraction, constant(coefficient))
    # The bits of `shifted` end in the whole number; the shift drops what magic put above it.
    exponent = builder.shl(
        builder.add(builder.bitcast(shifted, VI), ir.Constant(VI, [127] * LANES)), ir.Constant(VI, [23] * LANES)
    )
    power = builder.fmul(result, builder.bitcast(exponent, VF))
    return builder.select(tiny, constant(0.0), power)


def _taylor(degree: int) -> list[float]:
    log2 = 0.6931471805599453
    terms = [1.0]
    for i in range(1, degree + 1):
        terms.append(terms[-1] * log2 / i)
    return terms


_TAYLOR = _taylor(7)


def reduce(builder: ir.IRBuilder, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Return all lanes combined pairwise into one scalar."""
    half = vector.type.count // 2
    while half:
        low = builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, half), list(range(half))))
        high = builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, half), list(range(half, 2 * half))))
        vector, half = combine(low, high), half // 2
    return builder.extract_element(vector, I32(0))


def larger(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    """Return the larger of two vectors or scalars, lane by lane."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@contextmanager
def loop(builder: ir.IRBuilder, count: Any, starts: list[Any]) -> Iterator[tuple[Any, list[Any], list[Any]]]:
    """Loop `count` >= 1 times with values carried in registers; the body must replace the items of the second list."""
    before, body, after = builder.block, builder.append_basic_block("rows"), builder.append_basic_block("rows.end")
    builder.branch(body)
    builder.position_at_end(body)
    index = builder.phi(I64)
    index.add_incoming(I64(0), before)
    carried = [builder.phi(start.type) for start in starts]
    for phi, start in zip(carried, starts, strict=True):
        phi.add_incoming(start, before)
    results = list(carried)
    final: list[Any] = []
    yield index, results, final
    following = builder.add(index, I64(1))
    index.add_incoming(following, builder.block)
    for phi, result in zip(carried, results, strict=True):
        phi.add_incoming(result, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), body, after)
    builder.position_at_end(after)
    final.extend(results)


def addressed(count: int, returns: Any, body: Callable[..., Any], floats: int = 0) -> Any:
    """Make a Numba intrinsic of `count` int64 and then `floats` float32 arguments from `body(builder, *args)`."""
    signature = returns(*([types.int64] * count + [types.float32] * floats))

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        result = body(builder, *args)
        return context.get_dummy_value() if result is None else result

    def emit(typingctx: Any, *arguments: Any) -> Any:
        return signature, codegen

    # Numba needs each argument by name.
    names = ["typingctx", *(f"a{i}" for i in range(count + floats))]
    emit.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])  # type: ignore[attr-defined]
    return intrinsic(emit)


def _pause(builder: ir.IRBuilder) -> None:
    if _X86:
        call(builder, "llvm.x86.sse2.pause", ir.VoidType())


def _read(kind: Any) -> Callable[..., Any]:
    return lambda builder, address: builder.load(at(builder, address, kind))


def _write_i64(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    builder.store(value, at(builder, address, I64))


def _write_i32(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    builder.store(builder.trunc(value, I32), at(builder, address, I32))


load_i64 = addressed(1, types.int64, _read(I64))
load_i32 = addressed(1, types.int32, _read(I32))
load_f32 = addressed(1, types.float32, _read(F32))
load_f64 = addressed(1, types.float64, _read(ir.DoubleType()))
load_u16 = addressed(1, types.uint16, _read(I16))
load_i8 = addressed(1, types.int8, _read(I8))
store_i64 = addressed(2, types.void, _write_i64)
store_i32 = addressed(2, types.void, _write_i32)
prefetch_line = addressed(1, types.void, lambda builder, address: prefetch(builder, address, I64(0)))
pause = addressed(0, types.void, _pause)
double_from_bits = addressed(1, types.float64, lambda builder, bits: builder.bitcast(bits, ir.DoubleType()))
atomic_add = addressed(
    2, types.int64, lambda builder, address, value: builder.atomic_rmw("add", at(builder, address, I64), value, "acq_rel")
)
atomic_load = addressed(1, types.int64, lambda builder, address: builder.load_atomic(at(builder, address, I64), "acquire", 8))


def invoke(count: int) -> Any:
    """Make the intrinsic that calls the C function at its first argument with `count` int64s.

    Numba compiles a callee again inside every caller; through an address it is compiled once.
    """

    def body(builder: ir.IRBuilder, address: Any, *args: Any) -> None:
        function = ir.FunctionType(ir.VoidType(), [I64] * count)
        builder.call(builder.inttoptr(address, function.as_pointer()), args)

    return addressed(count + 1, types.void, body)


invoke_2, invoke_4, invoke_5, invoke_6, invoke_8 = invoke(2), invoke(4), invoke(5), invoke(6), invoke(8)


@intrinsic
def words(typingctx: Any, address: Any) -> Any:
    """Return the address of int64s as something to index."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], I64.as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@intrinsic
def floats(typingctx: Any, address: Any) -> Any:
    """Return the address of float32s as a pointer, which `numba.carray` makes an array of."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], F32.as_pointer())

    return types.CPointer(types.float32)(types.int64), codegen


@intrinsic
def store_f32(typingctx: Any, address: Any, value: Any) -> Any:
    """Store a float32 at an address."""
    return types.void(types.int64, types.float32), _store_scalar(F32)


@intrinsic
def store_u16(typingctx: Any, address: Any, value: Any) -> Any:
    """Store 16 bits at an address."""
    return types.void(types.int64, types.uint16), _store_scalar(I16)


@intrinsic
def store_i8(typingctx: Any, address: Any, value: Any) -> Any:
    """Store 8 bits at an address."""
    return types.void(types.int64, types.int8), _store_scalar(I8)


def _store_scalar(kind: Any) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        builder.store(args[1], at(builder, args[0], kind))
        return context.get_dummy_value()

    return codegen


@intrinsic
def float_bits(typingctx: Any, value: Any) -> Any:
    """Return the bits of a float32."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], I32)

    return types.uint32(types.float32), codegen


@intrinsic
def float_from_bits(typingctx: Any, bits: Any) -> Any:
    """Return the float32 of 32 bits."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], F32)

    return types.float32(types.uint32), codegen
