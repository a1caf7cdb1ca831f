"""Reading tokens back in bulk, and writing them into the window again. The twin of `storage` and `page_codes`."""

import numpy as np

from elastickv.backends.cpu import layout
from elastickv.backends.cpu.elements import (
    cold_page,
    cold_tokens,
    exact_page,
    get,
    key_plane_bytes,
    limited,
    plane_bytes,
    put,
    scale_bytes,
)
from elastickv.backends.cpu.intrinsics import (
    atomic_add,
    inlined,
    load_f32,
    load_i64,
    store_f32,
    store_i64,
    words,
)
from elastickv.backends.cpu.numba_cache import kernel
from elastickv.backends.cpu.page_codes import key_number, key_offset, value_number, value_offset
from elastickv.recipe import PAGE_TOKENS

_F = layout.BufferField
HEADS, KV_HEADS, DIM, SINKS, STRIDE = int(_F.HEADS), int(_F.KV_HEADS), int(_F.DIM), int(_F.SINKS), int(_F.STRIDE)
COLD_KEY_FORMAT, COLD_VALUE_FORMAT = int(_F.COLD_KEY_FORMAT), int(_F.COLD_VALUE_FORMAT)
EXACT_FORMAT, VALUE_GROUP, STATE_BASE = int(_F.EXACT_FORMAT), int(_F.VALUE_GROUP), int(_F.STATE_BASE)
BOUNDS_BASE, BOUNDS_HEAD_BYTES = int(_F.BOUNDS_BASE), int(_F.BOUNDS_HEAD_BYTES)
LENGTH, BAD = 8 * int(layout.State.LENGTH), 8 * int(layout.State.BAD_POSITION)
STATE_BYTES = 8 * layout.STATE_WORDS


@inlined
def _read_cold(c, head, number, keys, values):  # type: ignore[no-untyped-def]
    """Write the key and value of stored cold token `number` as float32 rows."""
    page, token = number // PAGE_TOKENS, number % PAGE_TOKENS
    key, value, dim, group = c[COLD_KEY_FORMAT], c[COLD_VALUE_FORMAT], c[DIM], c[VALUE_GROUP]
    codes = cold_page(c, head, page)
    value_codes = codes + key_plane_bytes(key, dim)
    key_scales = value_codes + plane_bytes(value, dim)
    value_scales = key_scales + scale_bytes(key, dim, group, False)
    bounds = c[BOUNDS_BASE] + head * c[BOUNDS_HEAD_BYTES] + page * dim * 4
    for d in range(dim):
        store_f32(keys + 4 * d, np.float32(key_number(key, codes, key_scales, bounds, dim, token, d)))
        store_f32(values + 4 * d, np.float32(value_number(value, value_codes, value_scales, dim, group, token, d)))


@inlined
def _read_exact(c, head, position, keys, values):  # type: ignore[no-untyped-def]
    fmt, dim = c[EXACT_FORMAT], c[DIM]
    page, token = exact_page(c, head, position)
    start = page + plane_bytes(fmt, dim)
    for d in range(dim):
        store_f32(keys + 4 * d, get(fmt, page + key_offset(fmt, token, d)))
        store_f32(values + 4 * d, get(fmt, start + value_offset(fmt, dim, token, d)))


@kernel("void(int64, int64)")
def read_block(arguments, thread):  # type: ignore[no-untyped-def]
    """Write tokens `first` to `last` - 1 of every (sequence, KV head) into (heads, last - first, head_dim) float32 rows."""
    a = words(arguments)
    descriptor, counters, keys, values, first, last = a[0], a[1], a[2], a[3], a[4], a[5]
    c = words(descriptor)
    head = atomic_add(counters, 1)
    while head < c[HEADS]:
        length = load_i64(c[STATE_BASE] + head * STATE_BYTES + LENGTH)
        cold = cold_tokens(c, length)
        for position in range(first, min(last, length)):
            at = (head * (last - first) + position - first) * c[DIM] * 4
            number = position - c[SINKS]
            if number < 0 or number >= cold:
                _read_exact(c, head, position, keys + at, values + at)
            elif number % c[STRIDE] == 0:
                _read_cold(c, head, number // c[STRIDE], keys + at, values + at)
        head = atomic_add(counters, 1)


@kernel("void(int64, int64)")
def write_window(arguments, thread):  # type: ignore[no-untyped-def]
    """Write (kv_heads, tokens, head_dim) float32 rows of one sequence into its window from position `first` on.

    Dequantized numbers slightly beyond the range of 16 bits become the largest 16-bit number.
    """
    a = words(arguments)
    descriptor, row, keys, values, first, tokens = a[0], a[1], a[2], a[3], a[4], a[5]
    c = words(descriptor)
    fmt, dim = c[EXACT_FORMAT], c[DIM]
    for kv_head in range(c[KV_HEADS]):
        state = c[STATE_BASE] + (row * c[KV_HEADS] + kv_head) * STATE_BYTES
        for number in range(tokens):
            page, token = exact_page(c, row * c[KV_HEADS] + kv_head, first + number)
            start = page + plane_bytes(fmt, dim)
            source = (kv_head * tokens + number) * dim * 4
            finite = True
            for d in range(dim):
                key, value = limited(fmt, load_f32(keys + source + 4 * d)), limited(fmt, load_f32(values + source + 4 * d))
                finite &= put(fmt, page + key_offset(fmt, token, d), key)
                finite &= put(fmt, start + value_offset(fmt, dim, token, d), value)
            # Values that shared a scale with one that was not finite.
            if not finite and (load_i64(state + BAD) < 0 or load_i64(state + BAD) > first + number):
                store_i64(state + BAD, first + number)
