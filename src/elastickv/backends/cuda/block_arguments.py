"""Arguments of the kernels over the blocks of a serving engine."""

from dataclasses import dataclass

from elastickv.backends.cuda.arguments import F32, I32, I64, Address, ArgumentStruct
from elastickv.kvcache.tensor_view import TensorView


@dataclass(frozen=True, kw_only=True)
class BlocksArguments(ArgumentStruct):
    """The memory of a serving engine: `Blocks` of kernels/blocks.cuh.

    Attributes
    ----------
    pages, window : bases of the blocks of pages and of recent tokens.
    page_table, window_table : (requests, columns) int32 numbers of blocks.
    page_stride, window_stride : bytes from one block to the next.
    slab_bytes : bytes from one KV head of a block of pages to the next.
    page_columns, window_columns : int32 from one request to the next.
    window_shift : log2 of the tokens in a block of the window.
    """

    pages: Address
    window: Address
    page_table: Address
    window_table: Address
    page_stride: I64
    window_stride: I64
    kv_heads: I32
    slab_bytes: I32
    page_columns: I32
    window_columns: I32
    window_shift: I32


@dataclass(frozen=True, kw_only=True)
class StepRows(ArgumentStruct):
    """Keys and values of a step's tokens, (tokens, kv_heads, head_dim), of the window's dtype.

    Attributes
    ----------
    key_stride, value_stride : elements from one token to the next.
    """

    keys: Address
    values: Address
    key_stride: I64
    value_stride: I64

    @classmethod
    def of(cls, keys: TensorView, values: TensorView) -> "StepRows":
        """Return the arguments for two tensors."""
        return cls(keys=keys.address, values=values.address, key_stride=keys.strides[0], value_stride=values.strides[0])


@dataclass(frozen=True, kw_only=True)
class GatherRows(ArgumentStruct):
    """Which tokens of consecutive requests are gathered, and where they go; (requests,) int32 each.

    Attributes
    ----------
    first, count : the first token of each request, and how many.
    start : the row of the first.
    exact_first : the first token that is read from the window, there and of all later ones; earlier ones are read from pages,
        which must be complete.
    first_request : row of the block tables of the first request.
    """

    first: Address
    count: Address
    start: Address
    exact_first: Address
    first_request: I32


@dataclass(frozen=True, kw_only=True)
class BlockRows(ArgumentStruct):
    """The rows of queries of a step, one query token each: the newest tokens of every request, in their order.

    Attributes
    ----------
    lengths : (requests,) int32, tokens of each request with those of this step.
    window_first : (requests,) int32, as `block_launch.first_in_window` writes it.
    starts : (requests + 1,) int32, where each request's rows begin; read where `queries_per_request` is 0.
    row_requests : (rows,) int32, the request of each row; read where `queries_per_request` is 0.
    rows : query tokens.
    queries_per_request : rows of each request; 0 if they differ.
    group : query heads of a KV head.
    exact_tokens : newest tokens that are read from the window.
    """

    lengths: Address
    window_first: Address
    starts: Address
    row_requests: Address
    rows: I32
    queries_per_request: I32
    group: I32
    exact_tokens: I32


@dataclass(frozen=True, kw_only=True)
class BlockDecodeArguments(ArgumentStruct):
    """What a decode of a serving engine's requests needs beside their rows and blocks.

    Attributes
    ----------
    partial, partial_ml, counters : what blocks leave for each other to merge.
    passes : passes over the query heads of a KV head.
    scale_log2 : factor of every score, in units of log2.
    listings, page_lists : what `block_launch.select_blocks` has written; None where every page is read.
    list_capacity : page numbers of a list.
    """

    partial: Address
    partial_ml: Address
    counters: Address
    passes: I32
    scale_log2: F32
    listings: Address
    page_lists: Address
    list_capacity: I32


@dataclass(frozen=True, kw_only=True)
class BlockSelectArguments(ArgumentStruct):
    """What a selection of pages writes, and its scratch memory.

    Attributes
    ----------
    listings : (rows, kv_heads, 4) int32, what each row reads: `Listing` of kernels/blocks.cuh.
    scores : (rows, kv_heads, list_capacity) float32; not used by one part of at most `ONE_BLOCK_PAGES` pages.
    counters : (rows, kv_heads) int32 zeros, before and after.
    parts : blocks that score the pages of one KV head of a row.
    """

    listings: Address
    scores: Address
    counters: Address
    parts: I32


@dataclass(frozen=True, kw_only=True)
class PageListArguments(ArgumentStruct):
    """One layer's lists of pages, and what says which of them a request's tokens read.

    Attributes
    ----------
    request_indices : (requests,) int32, each one's index of its lists.
    prompts : (requests,) int32, tokens of each one's prompt, which read every page.
    ratio_numbers : (requests,) int32, each one's row of `fractions`.
    fractions : (ratios, kv_heads) float64, shares of the pages to list.
    headers : (indices, ring, kv_heads, 4) int32, of each list: position of its anchor, that token's block of pages, and how
        many pages it has. Where they are not those expected, every page is read.
    page_lists : (indices, ring, kv_heads, list_capacity) uint16 numbers of pages.
    anchor_every, anchor_offset : as in `Recipe.steps_since_refresh`, in a request's own tokens.
    ring : lists of a request's last anchors that are kept: as many as one step's tokens read.
    list_capacity : at least the pages of the longest request.
    """

    request_indices: Address
    prompts: Address
    ratio_numbers: Address
    fractions: Address
    headers: Address
    page_lists: Address
    anchor_every: I32
    anchor_offset: I32
    ring: I32
    list_capacity: I32
