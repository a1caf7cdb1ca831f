"""Where tokens are in an engine's memory, and pages of exact numbers made from them.

`a` is a call's arguments (`host_blocks.BlockField`), `c` the descriptor of the page machinery (`layout.BufferField`).
"""

import numpy as np

from elastickv.backends.cpu import layout
from elastickv.backends.cpu.blocks.block_rows import copy_bytes, transpose_keys
from elastickv.backends.cpu.blocks.host_blocks import BlockField
from elastickv.backends.cpu.elements import plane_bytes
from elastickv.backends.cpu.intrinsics import COLUMNS, LANES, inlined, load_i32, load_i64, store_i64
from elastickv.recipe import PAGE_TOKENS

_B, _F = BlockField, layout.BufferField
PAGES, PAGE_STRIDE, SLAB_STRIDE = int(_B.PAGES), int(_B.PAGE_STRIDE), int(_B.SLAB_STRIDE)
WINDOW, WINDOW_STRIDE, WINDOW_SHIFT = int(_B.WINDOW), int(_B.WINDOW_STRIDE), int(_B.WINDOW_SHIFT)
PAGE_TABLE, PAGE_COLUMNS = int(_B.PAGE_TABLE), int(_B.PAGE_COLUMNS)
WINDOW_TABLE, WINDOW_COLUMNS = int(_B.WINDOW_TABLE), int(_B.WINDOW_COLUMNS)
KEYS, KEY_STRIDE, VALUES, VALUE_STRIDE = int(_B.KEYS), int(_B.KEY_STRIDE), int(_B.VALUES), int(_B.VALUE_STRIDE)
LENGTHS, STARTS, SCRATCH = int(_B.LENGTHS), int(_B.STARTS), int(_B.SCRATCH)
DIM, EXACT_FORMAT = int(_F.DIM), int(_F.EXACT_FORMAT)
WORK_BASE, WORK_THREAD_BYTES = int(_F.WORK_BASE), int(_F.WORK_THREAD_BYTES)
TABLE_BYTES = 8 * PAGE_TOKENS
ROW_TABLES_BYTES = 2 * TABLE_BYTES


@inlined
def element_bytes(c):  # type: ignore[no-untyped-def]
    """Return the bytes of one exact number."""
    return plane_bytes(c[EXACT_FORMAT], 1) // PAGE_TOKENS


@inlined
def row_tables(a, c, thread):  # type: ignore[no-untyped-def]
    """Return the address of a thread's scratch: the addresses of 32 keys and of 32 values, then whatever a kernel needs."""
    return c[WORK_BASE] + thread * c[WORK_THREAD_BYTES] + a[SCRATCH]


@inlined
def slab(a, request, page, head):  # type: ignore[no-untyped-def]
    """Return the address of the slab of one KV head of a request's page."""
    block = np.int64(load_i32(a[PAGE_TABLE] + 4 * (request * a[PAGE_COLUMNS] + page)))
    return a[PAGES] + block * a[PAGE_STRIDE] + head * a[SLAB_STRIDE]


@inlined
def window_row(a, c, block, token, head):  # type: ignore[no-untyped-def]
    """Return the address of a token's key in a block of the window; its value follows."""
    within = (head << a[WINDOW_SHIFT]) + (token & ((1 << a[WINDOW_SHIFT]) - 1))
    return a[WINDOW] + block * a[WINDOW_STRIDE] + within * 2 * c[DIM] * element_bytes(c)


@inlined
def step_tokens(a, request):  # type: ignore[no-untyped-def]
    """Return a request's tokens after the step, the first row of the step's tokens, and how many they are."""
    start = np.int64(load_i32(a[STARTS] + 4 * request))
    count = np.int64(load_i32(a[STARTS] + 4 * request + 4)) - start
    return np.int64(load_i32(a[LENGTHS] + 4 * request)), start, count


@inlined
def find_rows(a, c, request, head, token, count, step_first, start, tables):  # type: ignore[no-untyped-def]
    """Write the addresses of the keys and values of `count` tokens from `token` on.

    Tokens from `step_first` on are the step's own, of which the first is row `start`; those before are in the window.
    """
    row_bytes = c[DIM] * element_bytes(c)
    for number in range(count):
        position = token + number
        if position >= step_first:
            row = start + position - step_first
            store_i64(tables + 8 * number, a[KEYS] + row * a[KEY_STRIDE] + head * row_bytes)
            store_i64(tables + TABLE_BYTES + 8 * number, a[VALUES] + row * a[VALUE_STRIDE] + head * row_bytes)
        else:
            column = position >> a[WINDOW_SHIFT]
            block = np.int64(load_i32(a[WINDOW_TABLE] + 4 * (request * a[WINDOW_COLUMNS] + column)))
            where = window_row(a, c, block, position, head)
            store_i64(tables + 8 * number, where)
            store_i64(tables + TABLE_BYTES + 8 * number, where + row_bytes)


@inlined
def fill_page(c, count, tables, page):  # type: ignore[no-untyped-def]
    """Make the page of exact numbers of the first `count` rows in `tables`; what is behind them is not read later."""
    dim, fmt, element = c[DIM], c[EXACT_FORMAT], element_bytes(c)
    for number in range(count, (count + LANES - 1) // LANES * LANES):
        store_i64(tables + 8 * number, load_i64(tables))
    for first in range(0, count, LANES):
        transpose_keys(element, tables + 8 * first, dim, page + first * element)
    values = page + plane_bytes(fmt, dim)
    for number in range(count):
        source = load_i64(tables + TABLE_BYTES + 8 * number)
        for column in range(0, dim, COLUMNS):
            row_bytes = min(COLUMNS, dim - column) * element
            copy_bytes(source + column * element, values + column * PAGE_TOKENS * element + number * row_bytes, row_bytes)
