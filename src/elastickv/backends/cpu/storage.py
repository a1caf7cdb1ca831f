"""Appends a token to the ring of exact pages, and has the page that leaves the window quantized. `layout` describes both."""

import numpy as np

from elastickv.backends.cpu import layout
from elastickv.backends.cpu.elements import cold_tokens, exact_page, plane_bytes, put, rotate
from elastickv.backends.cpu.intrinsics import COLUMNS, inlined, invoke_4, load_f32, load_i64, store_i64, words
from elastickv.backends.cpu.numba_cache import kernel
from elastickv.backends.cpu.vector import scale_into
from elastickv.recipe import PAGE_TOKENS

_F = layout.BufferField
DIM, EXACT_FORMAT, STATE_BASE = int(_F.DIM), int(_F.EXACT_FORMAT), int(_F.STATE_BASE)
KEY_ROTATION, VALUE_ROTATION, ROTATED_BASE = int(_F.KEY_ROTATION), int(_F.VALUE_ROTATION), int(_F.ROTATED_BASE)
QUANTIZE_KEYS, QUANTIZE_VALUES = int(_F.QUANTIZE_KEYS), int(_F.QUANTIZE_VALUES)
LENGTH, BAD = 8 * int(layout.State.LENGTH), 8 * int(layout.State.BAD_POSITION)
STATE_BYTES = 8 * layout.STATE_WORDS
ONE = np.float32(1)


@inlined
def _rotated(row, target, dim, block):  # type: ignore[no-untyped-def]
    """Write the rotation of a row to `target` and return that address."""
    scale_into(target, row, dim, ONE)
    rotate(target, dim, block)
    return target


@kernel("void(int64, int64, int64, int64)")
def append_token(descriptor, head, keys, values):  # type: ignore[no-untyped-def]
    """Append the key and value (addresses of float32 rows) of one token to a (sequence, KV head)."""
    c = words(descriptor)
    state = c[STATE_BASE] + head * STATE_BYTES
    position = load_i64(state + LENGTH)
    fmt, dim = c[EXACT_FORMAT], c[DIM]
    page, token = exact_page(c, head, position)
    element = plane_bytes(fmt, 1) // PAGE_TOKENS
    if c[KEY_ROTATION] > 0:
        keys = _rotated(keys, c[ROTATED_BASE] + head * dim * 8, dim, c[KEY_ROTATION])
    if c[VALUE_ROTATION] > 0:
        values = _rotated(values, c[ROTATED_BASE] + head * dim * 8 + dim * 4, dim, c[VALUE_ROTATION])
    finite = True
    for d in range(dim):
        finite &= put(fmt, page + (d * PAGE_TOKENS + token) * element, load_f32(keys + 4 * d))
    for start in range(0, dim, COLUMNS):
        columns = min(COLUMNS, dim - start)
        row = page + plane_bytes(fmt, dim + start) + token * columns * element
        for column in range(columns):
            finite &= put(fmt, row + column * element, load_f32(values + 4 * (start + column)))
    if not finite and load_i64(state + BAD) < 0:
        store_i64(state + BAD, position)
    store_i64(state + LENGTH, position + 1)
    before, after = cold_tokens(c, position), cold_tokens(c, position + 1)
    if after > before:
        invoke_4(c[QUANTIZE_KEYS], descriptor, head, before // PAGE_TOKENS, 0)
        invoke_4(c[QUANTIZE_VALUES], descriptor, head, before // PAGE_TOKENS, 1)
