"""Storing a step's tokens in an engine's window, and quantizing the pages that they complete."""

import numpy as np

from elastickv.backends.cpu import layout
from elastickv.backends.cpu.blocks.block_rows import copy_bytes
from elastickv.backends.cpu.blocks.block_tokens import (
    ROW_TABLES_BYTES,
    element_bytes,
    fill_page,
    find_rows,
    row_tables,
    slab,
    step_tokens,
    window_row,
)
from elastickv.backends.cpu.blocks.host_blocks import DESCRIPTOR_BYTES, BlockField
from elastickv.backends.cpu.intrinsics import atomic_add, inlined, invoke_4, load_i64, store_i64, words
from elastickv.backends.cpu.numba_cache import kernel
from elastickv.recipe import PAGE_TOKENS

_B, _F = BlockField, layout.BufferField
KV_HEADS, REQUESTS, SLOT_MAPPING, WINDOW_SHIFT = int(_B.KV_HEADS), int(_B.REQUESTS), int(_B.SLOT_MAPPING), int(_B.WINDOW_SHIFT)
KEYS, KEY_STRIDE, VALUES, VALUE_STRIDE = int(_B.KEYS), int(_B.KEY_STRIDE), int(_B.VALUES), int(_B.VALUE_STRIDE)
DESCRIPTOR, DESCRIPTORS, COUNTERS = int(_B.DESCRIPTOR), int(_B.DESCRIPTORS), int(_B.COUNTERS)
BOUNDS_OFFSET, DIM = int(_B.BOUNDS_OFFSET), int(_F.DIM)
QUANTIZE_KEYS, QUANTIZE_VALUES = int(_F.QUANTIZE_KEYS), int(_F.QUANTIZE_VALUES)
COLD_BASE, BOUNDS_BASE, EXACT_BASE = 8 * int(_F.COLD_BASE), 8 * int(_F.BOUNDS_BASE), 8 * int(_F.EXACT_BASE)
TOKENS_OF_ITEM = 16


@inlined
def _store_tokens(a, c, first, last):  # type: ignore[no-untyped-def]
    """Copy rows `first` to `last` - 1 of the step to their places in the window; block 0 belongs to nobody."""
    row_bytes = c[DIM] * element_bytes(c)
    for row in range(first, last):
        slot = load_i64(a[SLOT_MAPPING] + 8 * row)
        block = slot >> a[WINDOW_SHIFT]
        if block > 0:
            for head in range(a[KV_HEADS]):
                where = window_row(a, c, block, slot, head)
                copy_bytes(a[KEYS] + row * a[KEY_STRIDE] + head * row_bytes, where, row_bytes)
                copy_bytes(a[VALUES] + row * a[VALUE_STRIDE] + head * row_bytes, where + row_bytes, row_bytes)


@inlined
def _quantize(a, c, thread, request, page, head, step_first, start):  # type: ignore[no-untyped-def]
    """Quantize a page through a thread's own descriptor, of a cache with one exact page and one cold page."""
    tables = row_tables(a, c, thread)
    exact = tables + ROW_TABLES_BYTES
    find_rows(a, c, request, head, page * PAGE_TOKENS, PAGE_TOKENS, step_first, start, tables)
    fill_page(c, PAGE_TOKENS, tables, exact)
    where = slab(a, request, page, head)
    own = a[DESCRIPTORS] + thread * DESCRIPTOR_BYTES
    store_i64(own + EXACT_BASE, exact)
    store_i64(own + COLD_BASE, where)
    store_i64(own + BOUNDS_BASE, where + a[BOUNDS_OFFSET])
    invoke_4(c[QUANTIZE_KEYS], own, 0, 0, 0)
    invoke_4(c[QUANTIZE_VALUES], own, 0, 0, 1)


@kernel("void(int64, int64)")
def store_step(arguments, thread):  # type: ignore[no-untyped-def]
    """Store all rows of a step. Threads take items by ticket: some rows, or one KV head of a page.

    A page's tokens from before the step are read from the window, where the step writes only later ones.
    """
    a = words(arguments)
    c = words(a[DESCRIPTOR])
    item, base = atomic_add(a[COUNTERS], 1), 0
    for request in range(a[REQUESTS]):
        length, start, count = step_tokens(a, request)
        step_first, rows = length - count, (count + TOKENS_OF_ITEM - 1) // TOKENS_OF_ITEM
        first_page, pages = step_first // PAGE_TOKENS, np.int64(0)
        if count > 0:
            pages = length // PAGE_TOKENS - first_page
        items = rows + pages * a[KV_HEADS]
        while item < base + items:
            number = item - base
            if number < rows:
                first = start + number * TOKENS_OF_ITEM
                _store_tokens(a, c, first, min(start + count, first + TOKENS_OF_ITEM))
            else:
                page, head = first_page + (number - rows) // a[KV_HEADS], (number - rows) % a[KV_HEADS]
                _quantize(a, c, thread, request, page, head, step_first, start)
            item = atomic_add(a[COUNTERS], 1)
        base += items
