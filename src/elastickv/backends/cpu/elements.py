"""Elements of a page: their offsets (see `layout`), and rounding to 16 and 8 bits."""

import math

import numpy as np

from elastickv.backends.cpu import layout
from elastickv.backends.cpu.intrinsics import (
    BF16,
    FORMAT_CODES,
    FP16,
    FP32,
    float_bits,
    float_from_bits,
    inlined,
    load_f32,
    load_u16,
    store_f32,
    store_u16,
)
from elastickv.kvcache.quantize import E4M3_VALUES
from elastickv.kvcache.rounding import LARGEST
from elastickv.kvcache.scorers import scale_factor
from elastickv.recipe import FORMATS, PAGE_TOKENS
from elastickv.recipe.formats import ScaleLayout

_F = layout.BufferField
SINKS, WINDOW, IS_DENSE = int(_F.SINKS), int(_F.WINDOW), int(_F.IS_DENSE)
ANCHOR_EVERY, ANCHOR_OFFSET = int(_F.ANCHOR_EVERY), int(_F.ANCHOR_OFFSET)
COLD_BASE, COLD_PAGE_BYTES, COLD_HEAD_BYTES = int(_F.COLD_BASE), int(_F.COLD_PAGE_BYTES), int(_F.COLD_HEAD_BYTES)
EXACT_BASE, EXACT_PAGE_BYTES, EXACT_HEAD_BYTES = int(_F.EXACT_BASE), int(_F.EXACT_PAGE_BYTES), int(_F.EXACT_HEAD_BYTES)
SINK_PAGES, RING_PAGES = int(_F.SINK_PAGES), int(_F.RING_PAGES)
BY_CODE = sorted(FORMAT_CODES, key=FORMAT_CODES.__getitem__)  # names of formats
# By format code, bytes of a page: of one channel's codes, of the scales that do not depend on the head, of a group's scales.
CHANNEL_BYTES = np.array([layout.plane_bytes(name, 1) for name in BY_CODE], np.int64)
KEY_PADDING = np.array([FORMATS[name].packed - 1 for name in BY_CODE], np.int64)  # `packed` is a power of two
KEY_SCALE_BYTES = np.array([layout.scale_bytes(name, 64, 64, False) for name in BY_CODE], np.int64)
_ONE_GROUP, _TWO_GROUPS = (np.array([layout.scale_bytes(n, 64, g, True) for n in BY_CODE], np.int64) for g in (64, 32))
GROUP_SCALE_BYTES = _TWO_GROUPS - _ONE_GROUP
VALUE_SCALE_BYTES = _ONE_GROUP - GROUP_SCALE_BYTES
RANGE_FACTORS = np.array(  # of scales, for the page scorers
    [scale_factor(n) if FORMATS[n].keys is ScaleLayout.CHANNEL else 1 for n in BY_CODE], np.float32
)
GROUPED = np.array([FORMATS[name].values is ScaleLayout.GROUP for name in BY_CODE])
MAGIC = np.float32(12582912.0)
SUBNORMAL_MAGIC = np.float32(0.5)
TWO_112 = np.float32(2.0**112)
HALF_MAX, BF16_MAX, FP32_MAX = (np.float32(LARGEST[name]) for name in ("fp16", "bf16", "fp32"))
E4M3_MAX, E4M3_LEAST_NORMAL, E4M3_STEPS = np.float32(np.nanmax(E4M3_VALUES)), np.float32(2.0**-6), np.float32(512)


@inlined
def rotate(row, dim, block):  # type: ignore[no-untyped-def]
    """Rotate a float32 row in place, as `kvcache.hadamard.rotated` does; `block` 0 leaves it."""
    step = 1
    while step < block:
        for start in range(0, dim, 2 * step):
            for d in range(start, start + step):
                first, second = load_f32(row + 4 * d), load_f32(row + 4 * (d + step))
                store_f32(row + 4 * d, first + second)
                store_f32(row + 4 * (d + step), first - second)
        step *= 2
    if block > 0:
        scale = np.float32(1 / math.sqrt(block))
        for d in range(dim):
            store_f32(row + 4 * d, load_f32(row + 4 * d) * scale)


@inlined
def plane_bytes(fmt, dim):  # type: ignore[no-untyped-def]
    """Return the bytes of one page's codes, K or V."""
    return dim * CHANNEL_BYTES[fmt]


@inlined
def key_plane_bytes(fmt, dim):  # type: ignore[no-untyped-def]
    """Return the bytes of one page's codes of K, which are packed by whole rows of channels."""
    return plane_bytes(fmt, (dim + KEY_PADDING[fmt]) & ~KEY_PADDING[fmt])


@inlined
def scale_bytes(fmt, dim, group, is_value):  # type: ignore[no-untyped-def]
    """Return the bytes of one page's scales of K or V inside the page."""
    return VALUE_SCALE_BYTES[fmt] + GROUP_SCALE_BYTES[fmt] * (dim // group) if is_value else KEY_SCALE_BYTES[fmt]


@inlined
def scale_group(fmt, dim, group):  # type: ignore[no-untyped-def]
    """Return how many channels of V share a scale: `group`, or all."""
    return group if GROUPED[fmt] else dim


@inlined
def cold_tokens(c, length):  # type: ignore[no-untyped-def]
    """Return how many of `length` tokens are cold, dropped ones included."""
    if c[IS_DENSE]:
        return 0
    return max(0, length - c[SINKS] - c[WINDOW]) // PAGE_TOKENS * PAGE_TOKENS


@inlined
def steps_since_refresh_at(c, step):  # type: ignore[no-untyped-def]
    """Return the steps since the last anchor, as `Recipe.steps_since_refresh` does."""
    step = max(step, 0)
    return min(step, (step + c[ANCHOR_OFFSET]) % c[ANCHOR_EVERY])


@inlined
def bf16_bits(x):  # type: ignore[no-untyped-def]
    """Round to bfloat16, ties to even; NaN stays NaN."""
    bits = float_bits(x)
    if x != x:
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@inlined
def fp16_bits(x):  # type: ignore[no-untyped-def]
    """Round to half precision, ties to even; too large becomes infinite. Not every host converts in hardware."""
    bits = np.int64(float_bits(x))
    sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        return np.uint16(sign | 0x7E00)
    if magnitude >= 0x47800000:
        return np.uint16(sign | 0x7C00)
    if magnitude < 0x38800000:
        # Adding 0.5 leaves the half's subnormal bits at the bottom, rounded by the processor.
        small = float_from_bits(np.uint32(magnitude)) + SUBNORMAL_MAGIC
        return np.uint16(sign | (np.int64(float_bits(small)) - 0x3F000000))
    return np.uint16(sign | ((magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13))


@inlined
def fp16_value(bits):  # type: ignore[no-untyped-def]
    """Return the float32 value of a half's bits."""
    magnitude, sign = np.uint32((bits & 0x7FFF) << 13), np.uint32((bits & 0x8000) << 16)
    if magnitude >= np.uint32(0x7C00 << 13):
        return float_from_bits(magnitude | np.uint32(0x7F800000) | sign)
    return float_from_bits(float_bits(float_from_bits(magnitude) * TWO_112) | sign)


@inlined
def bf16_value(bits):  # type: ignore[no-untyped-def]
    """Return the float32 value of a bfloat16's bits."""
    return float_from_bits(np.uint32(bits) << np.uint32(16))


@inlined
def whole(x):  # type: ignore[no-untyped-def]
    """Round a magnitude below 2^22 to a whole number, half to even."""
    return (x + MAGIC) - MAGIC


@inlined
def e4m3_bits(x):  # type: ignore[no-untyped-def]
    """Round to float8 e4m3, ties to even; too large becomes 448."""
    bits = float_bits(x)
    sign, magnitude = (bits >> np.uint32(24)) & np.uint32(0x80), min(abs(x), E4M3_MAX)
    if x != x:
        return sign | np.uint32(0x7F)
    if magnitude < E4M3_LEAST_NORMAL:
        return sign | np.uint32(whole(magnitude * E4M3_STEPS))
    size = float_bits(magnitude)
    rounded = (size + np.uint32(0x7FFFF) + ((size >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
    return sign | (rounded - np.uint32(120 << 3))


@inlined
def fp16_towards(x, up):  # type: ignore[no-untyped-def]
    """Round to half precision towards +infinity if `up`, else towards -infinity; return the bits."""
    bits = fp16_bits(x)
    near = fp16_value(bits)
    if up and near < x:
        return np.uint16(bits - 1 if bits > 0x8000 else (1 if bits == 0x8000 else bits + 1))
    if not up and near > x:
        return np.uint16(bits + 1 if bits >= 0x8000 else (0x8001 if bits == 0 else bits - 1))
    return bits


@inlined
def bf16_towards(x, up):  # type: ignore[no-untyped-def]
    """Round to bfloat16 towards +infinity if `up`, else towards -infinity; return the bits."""
    bits = float_bits(x)
    negative = (bits >> np.uint32(31)) == np.uint32(1)
    return np.uint16((bits + (np.uint32(0) if negative == up else np.uint32(0xFFFF))) >> np.uint32(16))


@inlined
def put(fmt, where, x):  # type: ignore[no-untyped-def]
    """Round and store one element of a float format; return whether it is finite as stored."""
    if fmt == FP32:
        store_f32(where, x)
        return x - x == np.float32(0)
    if fmt == BF16:
        bits = bf16_bits(x)
        store_u16(where, bits)
        return (bits & 0x7F80) != 0x7F80
    bits = fp16_bits(x)
    store_u16(where, bits)
    return (bits & 0x7C00) != 0x7C00


@inlined
def limited(fmt, x):  # type: ignore[no-untyped-def]
    """Return the nearest number in the range of a float format; NaN and infinity are unchanged."""
    most = HALF_MAX if fmt == FP16 else (BF16_MAX if fmt == BF16 else FP32_MAX)
    return min(max(x, -most), most) if x - x == np.float32(0) else x


@inlined
def get(fmt, where):  # type: ignore[no-untyped-def]
    """Return one stored element of a float format."""
    if fmt == FP32:
        return load_f32(where)
    if fmt == BF16:
        return bf16_value(load_u16(where))
    return fp16_value(load_u16(where))


@inlined
def cold_page(c, head, page):  # type: ignore[no-untyped-def]
    """Return the address of a cold page of a (sequence, KV head)."""
    return c[COLD_BASE] + head * c[COLD_HEAD_BYTES] + page * c[COLD_PAGE_BYTES]


@inlined
def exact_page(c, head, position):  # type: ignore[no-untyped-def]
    """Return the address of the exact page of a token, and the token's index in the page."""
    start = c[EXACT_BASE] + head * c[EXACT_HEAD_BYTES]
    if position < c[SINKS]:
        return start + position // PAGE_TOKENS * c[EXACT_PAGE_BYTES], position % PAGE_TOKENS
    after = position - c[SINKS]
    slot = c[SINK_PAGES] + after // PAGE_TOKENS % c[RING_PAGES]
    return start + slot * c[EXACT_PAGE_BYTES], after % PAGE_TOKENS
