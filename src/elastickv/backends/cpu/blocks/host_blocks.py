"""The memory of a serving engine, and the words by which the kernels know it and a call's arguments.

A block of pages holds 32 tokens: of each KV head a slab, which is a page (`layout`) and the scales and zeros of its keys'
channels, where there are any. A block of the window holds 2^shift tokens: [KV head][token][key, value] rows of the model's
dtype.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickv.backends.cpu import layout
from elastickv.backends.cpu.intrinsics import COLUMNS
from elastickv.recipe import FORMATS, Recipe
from elastickv.recipe.formats import ScaleLayout

Table = NDArray[np.int32]
SLAB_ALIGNMENT = 32


class BlockField(IntEnum):
    """Word of a call's arguments. Strides are in bytes, those of tables in int32."""

    PAGES = 0
    PAGE_STRIDE = 1
    SLAB_STRIDE = 2
    WINDOW = 3
    WINDOW_STRIDE = 4
    PAGE_TABLE = 5
    PAGE_COLUMNS = 6
    WINDOW_TABLE = 7
    WINDOW_COLUMNS = 8
    KV_HEADS = 9
    WINDOW_SHIFT = 10
    KEYS = 11  # of the step's tokens
    KEY_STRIDE = 12
    VALUES = 13
    VALUE_STRIDE = 14
    LENGTHS = 15
    STARTS = 16
    REQUESTS = 17
    QUERY = 18
    QUERY_STRIDE = 19
    OUTPUT = 20
    OUTPUT_STRIDE = 21
    WINDOW_FIRST = 22
    FACTOR = 23  # bits of a float64, for queries
    EXACT_TOKENS = 24
    PARTIAL = 25
    PENDING = 26
    SLOT_MAPPING = 27
    LISTED = 28  # of `gather`: requests, first tokens, numbers of tokens
    FIRST = 29
    COUNT = 30
    IS_EXACT = 31
    KEYS_OUT = 32
    VALUES_OUT = 33
    DESCRIPTOR = 34  # of the page machinery, `layout.BufferField`
    COUNTERS = 35
    SCRATCH = 36  # first byte, in a thread's scratch, behind that of the page machinery
    BOUNDS_OFFSET = 37  # from a slab to the scales of its keys' channels
    DESCRIPTORS = 38  # a copy of the descriptor for each thread
    SELECTED = 39  # of `decode`: for each row what it reads, `RowField` and a count for each KV head; 0: every page
    ANCHORS = 40  # of `list_pages`: `AnchorField` and a count for each KV head, and how many anchors there are
    ANCHOR_COUNT = 41
    SCORES = 42
    SCORES_BYTES = 43  # of one thread
    DEQUANTIZE = 44  # address of the function that makes float32 numbers of a slab
    IN_FLOATS = 45  # whether decodes multiply those, not codes by integers


class RowField(IntEnum):
    """Word of what one row of queries reads. Behind them stands how many pages of the list each KV head has."""

    LIST = 0  # address of the numbers of pages; `EVERY_PAGE`, or `NO_ROW` for a row that does not attend
    HEAD_BYTES = 1  # from one KV head's list to the next
    LISTED_PAGES = 2  # pages among which the list was chosen; those from there on are read too


class AnchorField(IntEnum):
    """Word of a row of queries that lists pages. Behind them stands how many pages each KV head lists."""

    REQUEST = 0
    ROW = 1
    PAGES = 2  # among which it chooses
    TARGET = 3  # address of the list, int32
    HEAD_BYTES = 4


EVERY_PAGE, NO_ROW = 0, -1
DESCRIPTOR_BYTES = 8 * len(layout.BufferField)
WORDS = len(BlockField)


@dataclass(frozen=True)
class HostBlocks:
    """Blocks in host memory, and which of them each request has. The caller keeps the memory of the blocks alive.

    Attributes
    ----------
    pages, window : addresses of the blocks of pages and of recent tokens.
    page_stride, window_stride : bytes from one block to the next.
    slab_stride : bytes from one KV head of a block of pages to the next.
    page_table, window_table : (requests, columns) int32 numbers of blocks; rows may be strided.
    kv_heads : KV heads.
    window_shift : log2 of the tokens in a block of the window.
    """

    pages: int
    page_stride: int
    slab_stride: int
    window: int
    window_stride: int
    page_table: Table
    window_table: Table
    kv_heads: int
    window_shift: int

    @classmethod
    def of(cls, pages: NDArray[np.uint8], window: NDArray[Any], page_table: Table, window_table: Table) -> "HostBlocks":
        """Return the blocks in two arrays.

        Parameters
        ----------
        pages : (blocks, kv_heads, slab bytes).
        window : (blocks, kv_heads, tokens, 2 x head_dim), a key and a value in each row; a power of two of tokens.
        page_table, window_table : as the attributes.
        """
        assert window.strides[1:] == (window[0, 0].nbytes, window[0, 0, 0].nbytes, window.itemsize), "blocks are contiguous"
        return cls(
            address(pages),
            pages.strides[0],
            pages.strides[1],
            address(window),
            window.strides[0],
            page_table,
            window_table,
            window.shape[1],
            window.shape[2].bit_length() - 1,
        )

    @cached_property
    def words(self) -> list[int]:
        """The first words of a call's arguments, up to `WINDOW_SHIFT`."""
        tables = [n for table in (self.page_table, self.window_table) for n in (address(table), table.strides[0] // 4)]
        memory = [self.pages, self.page_stride, self.slab_stride, self.window, self.window_stride]
        return [*memory, *tables, self.kv_heads, self.window_shift]


def address(array: NDArray[Any]) -> int:
    """Return the address of an array's first element."""
    return int(array.__array_interface__["data"][0])


def bounds_offset(recipe: Recipe, head_dim: int) -> int:
    """Return the bytes from a slab to the scales and zeros of its keys' channels, which follow the page."""
    return layout.page_bytes(str(recipe.key_format), str(recipe.value_format), head_dim, recipe.v_group(head_dim))


def slab_bytes(recipe: Recipe, head_dim: int) -> int:
    """Return the bytes of one KV head of a block of pages.

    V's last row is loaded as one of 32 columns, even where a chunk has fewer: what follows it must hold as many bytes.
    """
    key, value, group = str(recipe.key_format), str(recipe.value_format), recipe.v_group(head_dim)
    n_bytes = bounds_offset(recipe, head_dim) + layout.bounds_bytes(key, head_dim)
    codes = layout.key_plane_bytes(key, head_dim) + layout.plane_bytes(value, head_dim)
    return layout.up(max(n_bytes, codes + _beyond(value, head_dim, group)), SLAB_ALIGNMENT)


def _beyond(value: str, head_dim: int, group: int) -> int:
    """Return the bytes beyond V's codes that are loaded with its last row."""
    columns = (group if FORMATS[value].values is ScaleLayout.GROUP else head_dim) % COLUMNS
    loaded = {8: 2, 16: 2}.get(FORMATS[value].bits, 4)  # of a column at once
    return (COLUMNS - columns) * loaded if columns else 0
