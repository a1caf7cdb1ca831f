"""Decode, store and gather in the blocks of a serving engine, which owns the memory and the tables."""

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickv.backends.compilation_report import current_report
from elastickv.backends.cpu import page, threads
from elastickv.backends.cpu.blocks import engine_threads
from elastickv.backends.cpu.blocks.block_decode import decode_rows, most_items
from elastickv.backends.cpu.blocks.block_dequantize import dequantize_slab
from elastickv.backends.cpu.blocks.block_gather import gather_tokens
from elastickv.backends.cpu.blocks.block_selection import list_pages
from elastickv.backends.cpu.blocks.block_store import store_step
from elastickv.backends.cpu.blocks.block_tokens import ROW_TABLES_BYTES
from elastickv.backends.cpu.blocks.host_blocks import (
    DESCRIPTOR_BYTES,
    WORDS,
    AnchorField,
    BlockField,
    HostBlocks,
    Table,
    address,
    bounds_offset,
    slab_bytes,
)
from elastickv.backends.cpu.compilation import compile_kernels
from elastickv.backends.cpu.layout import (
    LINE_BYTES,
    PARTIAL_EXTRA,
    TAIL_BYTES,
    BufferField,
    State,
    format_code,
    layout,
    page_bytes,
    up,
)
from elastickv.backends.cpu.numba_cache import Kernel
from elastickv.backends.cpu.page_operands import INTEGERS
from elastickv.backends.cpu.quantizers import nearest_pages
from elastickv.backends.cpu.selection import weights_kernel
from elastickv.errors import UsageError
from elastickv.kvcache.scorers import scorer_of
from elastickv.recipe import DTYPES, PAGE_TOKENS, AttentionShape, Recipe

Rows = NDArray[Any]
_F = BufferField


class NumbaBlockKernels:
    """The kernels for one shape, dtype and pair of formats. Layers that share them may share one object.

    Arrays are views of an engine's tensors: float32, float16, or uint16 for the bits of bfloat16. Rows may be strided; what is
    inside a row is contiguous. Calls of one object must run one after the other: they share scratch memory.

    Parameters
    ----------
    shape : of the attention; `batch` is not used.
    dtype : 'fp32', 'bf16' or 'fp16', of the model and of the window.
    recipe : formats of the pages; its sinks and window are not used.
    exact_tokens : newest tokens that are read from the window. At least 32, so that a page is complete before it is read.

    Attributes
    ----------
    slab_bytes : bytes of one KV head of a block of pages; a multiple of 32.

    Raises
    ------
    UsageError : if no kernel supports the combination.
    CompileFailure : if a kernel does not compile.
    """

    def __init__(self, shape: AttentionShape, dtype: str, recipe: Recipe, exact_tokens: int) -> None:
        assert exact_tokens >= PAGE_TOKENS, "a page would be read before it is complete"
        if dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r} is unknown: choose {', '.join(DTYPES)}")
        if recipe.is_dense or recipe.selection != "all" or recipe.stride > 1:
            raise UsageError(f"{recipe} does not store and read every token: a serving engine's blocks need formats only")
        if recipe.uses_hessians:
            raise UsageError(f"{recipe}: a serving engine's blocks have no rounding={recipe.rounding}: leave it out")
        recipe.check_shape(shape.head_dim, shape.kv_heads)
        self.slab_bytes = slab_bytes(recipe, shape.head_dim)
        self._shape, self._element, self._exact_tokens = shape, 4 if dtype == "fp32" else 2, exact_tokens
        self._threads = engine_threads.count()
        quantizers = nearest_pages.quantizers(recipe, dtype)
        called = (decode_rows, store_step, gather_tokens, list_pages)
        self._weights = weights_kernel(scorer_of(recipe))
        kernels = [page.attend_page, *called, dequantize_slab, engine_threads.enter, *dict.fromkeys(quantizers)]
        compile_kernels(kernels, current_report(), self._threads)
        self._make_scratch(recipe, dtype, quantizers)
        self._partials, self._pending = np.empty(0, np.float32), np.zeros(0, np.int64)
        self._scores = np.empty(0, np.float32)
        self._words = np.zeros(WORDS, np.int64)
        self._words[BlockField.EXACT_TOKENS] = exact_tokens
        self._words[BlockField.BOUNDS_OFFSET] = bounds_offset(recipe, shape.head_dim)
        self._words[BlockField.COUNTERS] = address(self._counters)
        self._words[BlockField.DEQUANTIZE] = dequantize_slab.address
        formats = {format_code(str(fmt)) for fmt in (recipe.key_format, recipe.value_format)}
        self._words[BlockField.IN_FLOATS] = dtype == "fp32" and not formats.isdisjoint(INTEGERS)
        self._words[[BlockField.DESCRIPTOR, BlockField.DESCRIPTORS]] = address(self._descriptors)
        self._words[BlockField.SCRATCH] = self._work
        self._regions = {kernel: engine_threads.Region(kernel, self._threads, self._words) for kernel in called}

    def _make_scratch(self, recipe: Recipe, dtype: str, quantizers: tuple[Kernel, Kernel]) -> None:
        """Describe a cache of one exact page, whose memory is a thread's scratch, and one cold page, which is a slab."""
        shape = self._shape
        described = layout(AttentionShape(1, shape.query_heads, shape.kv_heads, shape.head_dim), 1, dtype, recipe, 1)
        self._work = described.fields[_F.WORK_THREAD_BYTES]
        # A page of exact numbers, or of float32; or the queries of a KV head, with the weights of scales and zeros.
        numbers = page_bytes("fp32", "fp32", shape.head_dim, shape.head_dim) + TAIL_BYTES
        of_thread = self._work + ROW_TABLES_BYTES + up(max(numbers, (shape.group + 2) * shape.head_dim * 4), LINE_BYTES)
        self._scratch = np.zeros(self._threads * of_thread + LINE_BYTES, np.uint8)
        self._state = np.full(len(State), -1, np.int64)
        self._counters = np.zeros(LINE_BYTES // 8, np.int64)
        fields = np.array(described.fields, np.int64)
        for name in (_F.SINKS, _F.COLD_HEAD_BYTES, _F.EXACT_HEAD_BYTES, _F.BOUNDS_HEAD_BYTES, _F.SINK_PAGES):
            fields[name] = 0
        # A page's distance to the next one is counted in bytes.
        fields[[_F.RING_PAGES, _F.COLD_PAGE_BYTES, _F.BOUNDS_PAGE_BYTES]] = 1
        fields[_F.EXACT_FORMAT] = format_code(dtype)
        fields[_F.WORK_BASE] = up(address(self._scratch), LINE_BYTES)
        fields[_F.WORK_THREAD_BYTES] = of_thread
        fields[_F.STATE_BASE] = address(self._state)
        fields[_F.PAGE_KERNEL] = page.attend_page.address
        fields[_F.WEIGHTS_KERNEL] = self._weights.address
        fields[[_F.QUANTIZE_KEYS, _F.QUANTIZE_VALUES]] = [one.address for one in quantizers]
        self._descriptors = np.tile(fields, (self._threads, 1))
        assert self._descriptors.strides[0] == DESCRIPTOR_BYTES

    def store(
        self, blocks: HostBlocks, keys: Rows, values: Rows, lengths: Table, starts: Table, slot_mapping: NDArray[np.int64]
    ) -> None:
        """Store a step's tokens in the window, and quantize the pages that they complete.

        Parameters
        ----------
        keys, values : (tokens, kv_heads, head_dim) of the step's tokens.
        lengths : (requests,) int32, tokens of each request with those of the step.
        starts : (requests + 1,) int32, the first row of each request, and the end of the last.
        slot_mapping : (tokens,) int64 places in the window; those in block 0 are not stored.
        """
        words = self._step(blocks, keys, values, lengths, starts)
        words[BlockField.SLOT_MAPPING] = address(slot_mapping)
        self._launch(store_step, len(keys))

    def decode(
        self,
        blocks: HostBlocks,
        keys: Rows,
        values: Rows,
        query: Rows,
        output: Rows,
        lengths: Table,
        starts: Table,
        window_first: Table,
        scale: float,
        selected: NDArray[np.int64] | None = None,
    ) -> None:
        """Attend with a step's tokens, which `store` was given before, to their past and themselves.

        A query at position t reads tokens up to t - exact_tokens from pages, as well as all below `window_first`; others are
        read from the window, and the step's own from `keys` and `values`.

        Parameters
        ----------
        keys, values, lengths, starts : as in `store`.
        query : (tokens, query_heads, head_dim).
        output : the same shape.
        window_first : (requests,) int32, the first token whose window block, and all later ones, are there; a multiple of 32.
        scale : of scores.
        selected : (tokens, fields + kv_heads), `RowField` and how many pages of its list each KV head has; None: every page is
            read. The caller keeps the lists alive.
        """
        words, shape = self._step(blocks, keys, values, lengths, starts), self._shape
        rows, longest = len(query), int(lengths.max(initial=0))
        self._reserve(rows, longest)
        # `prepare` multiplies by head_dim^-1/2.
        factor = struct.unpack("q", struct.pack("d", scale * math.sqrt(shape.head_dim)))[0]
        words[BlockField.QUERY : BlockField.FACTOR + 1] = (
            address(query), query.strides[0], address(output), output.strides[0], address(window_first), factor,
        )  # fmt: skip
        words[BlockField.SELECTED] = 0 if selected is None else address(selected)
        self._launch(decode_rows, rows * longest)

    def list_pages(self, blocks: HostBlocks, query: Rows, anchors: NDArray[np.int64]) -> None:
        """List the pages of the best scores for rows of queries, the first page always among them, ascending.

        Parameters
        ----------
        query : (tokens, query_heads, head_dim).
        anchors : (anchors, fields + kv_heads), `AnchorField` and how many pages each KV head lists, at least 1.
        """
        words, pages = self._words, int(anchors[:, AnchorField.PAGES].max(initial=0))
        of_thread = up(pages, LINE_BYTES // 4) + LINE_BYTES // 4  # scores are read in whole vectors
        if len(self._scores) < of_thread * self._threads:
            self._scores = np.empty(of_thread * self._threads, np.float32)
        words[: BlockField.WINDOW_SHIFT + 1] = blocks.words
        words[[BlockField.QUERY, BlockField.QUERY_STRIDE]] = address(query), query.strides[0]
        words[BlockField.ANCHORS : BlockField.SCORES_BYTES + 1] = (
            address(anchors), len(anchors), address(self._scores), 4 * of_thread,
        )  # fmt: skip
        # A score reads a scale and a zero for each channel of a page: like one of its tokens.
        self._launch(list_pages, len(anchors) * pages)

    def gather(
        self,
        blocks: HostBlocks,
        requests: Sequence[int] | Table,
        first: Sequence[int] | Table,
        count: Sequence[int] | Table,
        exact: bool,
        keys_out: Rows,
        values_out: Rows,
    ) -> None:
        """Write tokens of some requests as rows of the model's dtype, one request after the other.

        Parameters
        ----------
        requests : numbers of the requests.
        first, count : of each, its tokens `first` to `first` + `count` - 1.
        exact : whether to read the window; else pages are dequantized.
        keys_out, values_out : (sum of counts, kv_heads, head_dim), contiguous.
        """
        listed, firsts, counts = (np.ascontiguousarray(numbers, np.int32) for numbers in (requests, first, count))
        assert keys_out.flags.c_contiguous and values_out.flags.c_contiguous, "rows are written one after the other"
        assert len(keys_out) == len(values_out) == counts.sum(), "as many rows as tokens are written"
        words = self._words
        words[: BlockField.WINDOW_SHIFT + 1] = blocks.words
        words[BlockField.REQUESTS] = len(listed)
        words[BlockField.LISTED : BlockField.VALUES_OUT + 1] = (
            address(listed), address(firsts), address(counts), exact, address(keys_out), address(values_out),
        )  # fmt: skip
        self._launch(gather_tokens, len(keys_out))

    def _step(self, blocks: HostBlocks, keys: Rows, values: Rows, lengths: Table, starts: Table) -> NDArray[np.int64]:
        words = self._words
        words[: BlockField.WINDOW_SHIFT + 1] = blocks.words
        words[BlockField.KEYS : BlockField.REQUESTS + 1] = (
            address(keys), keys.strides[0], address(values), values.strides[0], address(lengths), address(starts), len(lengths),
        )  # fmt: skip
        return words

    def _reserve(self, rows: int, longest: int) -> None:
        """Make room for the partial results of so many rows."""
        shape = self._shape
        items = rows * shape.kv_heads * most_items(longest, self._exact_tokens)
        needed = items * shape.group * (shape.head_dim + PARTIAL_EXTRA)
        if len(self._partials) < needed:
            self._partials = np.empty(needed, np.float32)
            self._words[BlockField.PARTIAL] = address(self._partials)
        if len(self._pending) < rows * shape.kv_heads:
            self._pending = np.zeros(rows * shape.kv_heads, np.int64)
            self._words[BlockField.PENDING] = address(self._pending)

    def _launch(self, kernel: Kernel, tokens: int) -> None:
        self._counters[0] = 0
        elements = 2 * tokens * self._shape.kv_heads * self._shape.head_dim
        self._regions[kernel](threads.worth(elements, self._threads) > 1)
