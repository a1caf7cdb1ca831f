"""Tokens of some requests as contiguous rows, from the window or dequantized from pages."""

import numpy as np

from elastickv.backends.cpu import layout
from elastickv.backends.cpu.blocks.block_rows import copy_bytes, narrow_row
from elastickv.backends.cpu.blocks.block_tokens import ROW_TABLES_BYTES, element_bytes, row_tables, slab, window_row
from elastickv.backends.cpu.blocks.host_blocks import BlockField
from elastickv.backends.cpu.intrinsics import atomic_add, inlined, invoke_5, load_i32, words
from elastickv.backends.cpu.numba_cache import kernel
from elastickv.recipe import PAGE_TOKENS

_B, _F = BlockField, layout.BufferField
KV_HEADS, REQUESTS, IS_EXACT = int(_B.KV_HEADS), int(_B.REQUESTS), int(_B.IS_EXACT)
LISTED, FIRST, COUNT = int(_B.LISTED), int(_B.FIRST), int(_B.COUNT)
KEYS_OUT, VALUES_OUT = int(_B.KEYS_OUT), int(_B.VALUES_OUT)
WINDOW_TABLE, WINDOW_COLUMNS, WINDOW_SHIFT = int(_B.WINDOW_TABLE), int(_B.WINDOW_COLUMNS), int(_B.WINDOW_SHIFT)
DESCRIPTOR, COUNTERS = int(_B.DESCRIPTOR), int(_B.COUNTERS)
BOUNDS_OFFSET, DEQUANTIZE = int(_B.BOUNDS_OFFSET), int(_B.DEQUANTIZE)
DIM, EXACT_FORMAT = int(_F.DIM), int(_F.EXACT_FORMAT)
ONE = np.float32(1)


@inlined
def _copy_token(a, c, request, head, token, keys, values):  # type: ignore[no-untyped-def]
    column = token >> a[WINDOW_SHIFT]
    block = np.int64(load_i32(a[WINDOW_TABLE] + 4 * (request * a[WINDOW_COLUMNS] + column)))
    where, row_bytes = window_row(a, c, block, token, head), c[DIM] * element_bytes(c)
    copy_bytes(where, keys, row_bytes)
    copy_bytes(where + row_bytes, values, row_bytes)


@kernel("void(int64, int64)")
def gather_tokens(arguments, thread):  # type: ignore[no-untyped-def]
    """Write `COUNT` tokens from `FIRST` on of each listed request. Threads take items by ticket: one KV head of a page."""
    a = words(arguments)
    c = words(a[DESCRIPTOR])
    item, base, written = atomic_add(a[COUNTERS], 1), 0, 0
    dim, row_bytes, scratch = c[DIM], c[DIM] * element_bytes(c), row_tables(a, c, thread) + ROW_TABLES_BYTES
    for entry in range(a[REQUESTS]):
        request = np.int64(load_i32(a[LISTED] + 4 * entry))
        first, count = np.int64(load_i32(a[FIRST] + 4 * entry)), np.int64(load_i32(a[COUNT] + 4 * entry))
        first_page, pages = first // PAGE_TOKENS, np.int64(0)
        if count > 0:
            pages = (first + count - 1) // PAGE_TOKENS + 1 - first_page
        items = pages * a[KV_HEADS]
        while item < base + items:
            page, head = first_page + (item - base) // a[KV_HEADS], (item - base) % a[KV_HEADS]
            start = page * PAGE_TOKENS
            if not a[IS_EXACT]:
                where = slab(a, request, page, head)
                invoke_5(a[DEQUANTIZE], a[DESCRIPTOR], where, where + a[BOUNDS_OFFSET], scratch, 0)
            for token in range(max(first, start), min(first + count, start + PAGE_TOKENS)):
                offset = ((written + token - first) * a[KV_HEADS] + head) * row_bytes
                keys, values = a[KEYS_OUT] + offset, a[VALUES_OUT] + offset
                if a[IS_EXACT]:
                    _copy_token(a, c, request, head, token, keys, values)
                else:
                    row = scratch + (token - start) * dim * 4
                    narrow_row(c[EXACT_FORMAT], row, dim, keys, ONE)
                    narrow_row(c[EXACT_FORMAT], row + PAGE_TOKENS * dim * 4, dim, values, ONE)
            item = atomic_add(a[COUNTERS], 1)
        base += items
        written += count
