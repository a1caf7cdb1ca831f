"""Attention of a step's tokens to their requests' pages, window and own keys and values.

Each row of queries is divided into items of some pages of one KV head, in the same way whatever else is in the batch and
however many threads there are: results depend on neither. The item that finishes a row's head last merges its partials.
A row may read listed pages alone (`block_selection`).

Pages of a float32 model are dequantized before they are multiplied, as those of a prompt's chunk are: 16-bit integers would
round its queries, and what a token attends to would depend on the step that computes it.
"""

import numpy as np

from elastickv.backends.cpu import layout
from elastickv.backends.cpu.blocks.block_rows import narrow_row, widen_row
from elastickv.backends.cpu.blocks.block_tokens import (
    ROW_TABLES_BYTES,
    element_bytes,
    fill_page,
    find_rows,
    row_tables,
    slab,
    step_tokens,
)
from elastickv.backends.cpu.blocks.host_blocks import EVERY_PAGE, NO_ROW, BlockField, RowField
from elastickv.backends.cpu.decode import merge_partial
from elastickv.backends.cpu.intrinsics import (
    atomic_add,
    double_from_bits,
    inlined,
    invoke_5,
    invoke_8,
    load_i32,
    load_i64,
    prefetch_line,
    store_i64,
    words,
)
from elastickv.backends.cpu.numba_cache import kernel
from elastickv.backends.cpu.page import prepare, write_partials
from elastickv.recipe import PAGE_TOKENS

_B, _F = BlockField, layout.BufferField
KV_HEADS, REQUESTS, WINDOW_FIRST = int(_B.KV_HEADS), int(_B.REQUESTS), int(_B.WINDOW_FIRST)
QUERY, QUERY_STRIDE = int(_B.QUERY), int(_B.QUERY_STRIDE)
OUTPUT, OUTPUT_STRIDE = int(_B.OUTPUT), int(_B.OUTPUT_STRIDE)
FACTOR, EXACT_TOKENS = int(_B.FACTOR), int(_B.EXACT_TOKENS)
PARTIAL, PENDING = int(_B.PARTIAL), int(_B.PENDING)
DESCRIPTOR, COUNTERS, BOUNDS_OFFSET = int(_B.DESCRIPTOR), int(_B.COUNTERS), int(_B.BOUNDS_OFFSET)
SLAB_STRIDE, DEQUANTIZE, IN_FLOATS = int(_B.SLAB_STRIDE), int(_B.DEQUANTIZE), int(_B.IN_FLOATS)
SELECTED, LIST, HEAD_BYTES, LISTED_PAGES = int(_B.SELECTED), *(8 * int(field) for field in RowField)
ROW_WORDS = len(RowField)
GROUP, DIM, EXACT_FORMAT, PAGE_KERNEL = int(_F.GROUP), int(_F.DIM), int(_F.EXACT_FORMAT), int(_F.PAGE_KERNEL)
COLD_KEY_FORMAT, COLD_VALUE_FORMAT = int(_F.COLD_KEY_FORMAT), int(_F.COLD_VALUE_FORMAT)
EXTRA, LINE_BYTES = layout.PARTIAL_EXTRA, layout.LINE_BYTES
SPLITS = 16  # of a row's pages, at most, until they reach the most pages of an item
PAGES_OF_ITEM, EXACT_PAGES_OF_ITEM = 16, 8  # at least; a page of exact numbers takes longer
MOST_PAGES = layout.SPLIT_MAX_PAGES
ZERO, ONE, NOTHING = np.float32(0), np.float32(1), np.float32(-np.inf)


def most_items(tokens: int, exact_tokens: int) -> int:
    """Return the most items of one KV head of a row with up to `tokens` tokens and `exact_tokens` not read from pages."""
    shares = ((-(-tokens // PAGE_TOKENS), PAGES_OF_ITEM), (-(-exact_tokens // PAGE_TOKENS), EXACT_PAGES_OF_ITEM))
    return sum(min(-(-pages // least), max(SPLITS, -(-pages // MOST_PAGES))) for pages, least in shares)


@inlined
def _item_pages(pages, least):  # type: ignore[no-untyped-def]
    """Return how many of a row's pages an item has."""
    return min(max((pages + SPLITS - 1) // SPLITS, least), MOST_PAGES)


@inlined
def _list_of(a, row, head):  # type: ignore[no-untyped-def]
    """Return the address of a head's listed pages and how many there are, and where those begin that are read beside them.

    The address is `EVERY_PAGE` where nothing is selected.
    """
    listed, count, others = EVERY_PAGE, np.int64(0), np.int64(0)
    if a[SELECTED] != 0:
        entry = a[SELECTED] + row * 8 * (ROW_WORDS + a[KV_HEADS])
        listed = load_i64(entry + LIST)
        if listed != EVERY_PAGE and listed != NO_ROW:
            listed += head * load_i64(entry + HEAD_BYTES)
            count, others = load_i64(entry + 8 * (ROW_WORDS + head)), load_i64(entry + LISTED_PAGES)
    return listed, count, others


@inlined
def _page(listed, count, others, number):  # type: ignore[no-untyped-def]
    """Return the `number`-th page that is read."""
    if number >= count:
        return others + number - count
    return np.int64(load_i32(listed + 4 * number))


@inlined
def _formats(a, c, is_cold):  # type: ignore[no-untyped-def]
    """Return the formats of K and V as they are multiplied."""
    if is_cold and not a[IN_FLOATS]:
        return c[COLD_KEY_FORMAT], c[COLD_VALUE_FORMAT]
    return c[EXACT_FORMAT], c[EXACT_FORMAT]


@inlined
def _attend_pages(a, thread, request, row, head, first, last, tokens):  # type: ignore[no-untyped-def]
    """Attend to the `first`-th to `last` - 1-th page that is read, of which only `tokens` tokens are read."""
    descriptor = a[DESCRIPTOR]
    c = words(descriptor)
    key, value = _formats(a, c, True)
    listed, count, others = _list_of(a, row, head)
    page = _page(listed, count, others, first)
    following = slab(a, request, page, head)
    for number in range(first, last):
        where, valid = following, min(PAGE_TOKENS, tokens - page * PAGE_TOKENS)
        page = _page(listed, count, others, min(number + 1, last - 1))
        following = slab(a, request, page, head)
        bounds, distance = where + a[BOUNDS_OFFSET], following - where
        if a[IN_FLOATS]:
            floats = row_tables(a, c, thread) + ROW_TABLES_BYTES
            for line in range(0, a[SLAB_STRIDE], LINE_BYTES):
                prefetch_line(following + line)
            invoke_5(a[DEQUANTIZE], descriptor, where, bounds, floats, 1)
            where, distance = floats, 0
        invoke_8(c[PAGE_KERNEL], descriptor, thread, key, value, where, bounds, valid, distance)


@inlined
def _attend_exact(a, thread, request, head, first, last, step_first, start):  # type: ignore[no-untyped-def]
    """Attend to tokens `first` to `last` - 1 in the window and among the step's own."""
    descriptor = a[DESCRIPTOR]
    c = words(descriptor)
    tables = row_tables(a, c, thread)
    page = tables + ROW_TABLES_BYTES
    for token in range(first, last, PAGE_TOKENS):
        count = min(PAGE_TOKENS, last - token)
        find_rows(a, c, request, head, token, count, step_first, start, tables)
        fill_page(c, count, tables, page)
        invoke_8(c[PAGE_KERNEL], descriptor, thread, c[EXACT_FORMAT], c[EXACT_FORMAT], page, 0, count, 0)


@inlined
def _merge(a, c, thread, row, head, first, splits):  # type: ignore[no-untyped-def]
    """Merge the partials of one head of a row, in their order, and write its outputs."""
    group, dim = c[GROUP], c[DIM]
    partial_bytes, element = (dim + EXTRA) * 4, element_bytes(c)
    merged = row_tables(a, c, thread) + ROW_TABLES_BYTES
    for g in range(group):
        top, total = NOTHING, ZERO
        for split in range(splits):
            partial = a[PARTIAL] + ((first + split) * group + g) * partial_bytes
            top, total = merge_partial(merged, top, total, partial, dim, ZERO)
        target = a[OUTPUT] + row * a[OUTPUT_STRIDE] + (head * group + g) * dim * element
        narrow_row(c[EXACT_FORMAT], merged, dim, target, ONE / total)


@inlined
def _attend_item(a, thread, request, row, head, position, step_first, start, base, item):  # type: ignore[no-untyped-def]
    """Attend with the queries of one KV head to a share of what they read; `base` is the head's first item."""
    c = words(a[DESCRIPTOR])
    group, dim = c[GROUP], c[DIM]
    cold, pages, cold_size, cold_splits, exact_size, exact_splits = _shares(a, request, row, head, position)
    splits, split = cold_splits + exact_splits, item - base
    queries = row_tables(a, c, thread) + ROW_TABLES_BYTES
    source = a[QUERY] + row * a[QUERY_STRIDE] + head * group * dim * element_bytes(c)
    widen_row(c[EXACT_FORMAT], source, group * dim, queries, np.float32(double_from_bits(a[FACTOR])))
    is_cold = split < cold_splits
    key, value = _formats(a, c, is_cold)
    prepare(c, thread, queries, key)
    if is_cold:
        first = split * cold_size
        _attend_pages(a, thread, request, row, head, first, min(pages, first + cold_size), cold)
    else:
        size = exact_size * PAGE_TOKENS
        first = cold + (split - cold_splits) * size
        _attend_exact(a, thread, request, head, first, min(position + 1, first + size), step_first, start)
    write_partials(c, thread, value, a[PARTIAL] + item * group * (dim + EXTRA) * 4)
    pending = a[PENDING] + 8 * (row * a[KV_HEADS] + head)
    if atomic_add(pending, 1) == splits - 1:
        store_i64(pending, 0)
        _merge(a, c, thread, row, head, base, splits)


@inlined
def _shares(a, request, row, head, position):  # type: ignore[no-untyped-def]
    """Return what one KV head of a query at `position` reads, and its shares.

    Tokens below the first number are read from pages, of which the second number says how many are read. Then follow pages of
    an item and items: of pages, of exact tokens. A row that does not attend has no item.
    """
    window_first = np.int64(load_i32(a[WINDOW_FIRST] + 4 * request))
    cold = max(0, position - a[EXACT_TOKENS] + 1, min(window_first, position + 1))
    pages, exact_pages = (cold + PAGE_TOKENS - 1) // PAGE_TOKENS, (position - cold + PAGE_TOKENS) // PAGE_TOKENS
    listed, count, others = _list_of(a, row, head)
    if listed == NO_ROW:
        pages, exact_pages = np.int64(0), np.int64(0)
    elif listed != EVERY_PAGE:
        pages += count - others
    size, exact_size = _item_pages(pages, PAGES_OF_ITEM), _item_pages(exact_pages, EXACT_PAGES_OF_ITEM)
    return cold, pages, size, (pages + size - 1) // size, exact_size, (exact_pages + exact_size - 1) // exact_size


@kernel("void(int64, int64)")
def decode_rows(arguments, thread):  # type: ignore[no-untyped-def]
    """Write the outputs of all rows of queries. Threads take items by ticket, and walk along rows and heads with them."""
    a = words(arguments)
    item, base = atomic_add(a[COUNTERS], 1), 0
    for request in range(a[REQUESTS]):
        length, start, count = step_tokens(a, request)
        for number in range(count):
            row, position = start + number, length - count + number
            for head in range(a[KV_HEADS]):
                _, _, _, cold_splits, _, exact_splits = _shares(a, request, row, head, position)
                while item < base + cold_splits + exact_splits:
                    _attend_item(a, thread, request, row, head, position, length - count, start, base, item)
                    item = atomic_add(a[COUNTERS], 1)
                base += cold_splits + exact_splits
