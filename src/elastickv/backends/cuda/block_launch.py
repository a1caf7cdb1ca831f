"""One typed function per kernel that reads or writes the blocks of a serving engine, as `launch.py` has one for each other."""

from elastickv.backends.cuda.arguments import I32, I64, Address
from elastickv.backends.cuda.block_arguments import (
    BlockDecodeArguments,
    BlockRows,
    BlocksArguments,
    BlockSelectArguments,
    GatherRows,
    PageListArguments,
    StepRows,
)
from elastickv.backends.cuda.launch import Grid, kernel
from elastickv.recipe import PAGE_TOKENS

_STORE_BLOCKS = 8192
_GATHER_BLOCKS = 8192


@kernel
def store_blocks(
    longest: int,
    *,
    tokens: StepRows,
    blocks: BlocksArguments,
    lengths: Address,
    starts: Address,
    slot_mapping: Address,
    bad: Address,
    requests: I32,
    layer: I32,
) -> Grid:
    """Store the tokens of a step, up to `longest` a request, in the window, and quantize the pages that they complete.

    Parameters
    ----------
    lengths : (requests,) int32, tokens of each request after the step.
    starts : (requests + 1,) int32, where each request's tokens begin. Only the newest lengths[i] of them exist: a request of
        length 0 has none, whatever its starts say.
    slot_mapping : (tokens,) int64 slots of the window; those of block 0, and negative ones, store nothing.
    bad : (requests,) words of `BadToken`, lowered where a token with a slot that is not negative has values that cannot be
        stored.
    layer : its number, which the words name.
    """
    heads = 2 * blocks.kv_heads
    if longest <= PAGE_TOKENS:
        return 1, heads, requests
    return min(requests * (longest // PAGE_TOKENS + 2), max(2, _STORE_BLOCKS // heads)), heads, 1


@kernel
def gather_blocks(
    longest: int, requests: int, *, keys: Address, values: Address, blocks: BlocksArguments, rows: GatherRows
) -> Grid:
    """Write stored tokens of some requests, up to `longest` each, to `keys` and `values`.

    Parameters
    ----------
    keys, values : (rows, kv_heads, head_dim) of the window's dtype, contiguous and aligned to 16 bytes.
    """
    heads = blocks.kv_heads
    return heads, min(-(-longest // PAGE_TOKENS) + 1, max(1, _GATHER_BLOCKS // (heads * requests))), requests


@kernel
def first_in_window(
    requests: int, *, blocks: BlocksArguments, lengths: Address, starts: Address, exact_tokens: I32, first: Address
) -> Grid:
    """Write the first token whose window block, and all later ones before the step, are there; a multiple of 32.

    Parameters
    ----------
    lengths, starts : as in `store_blocks`.
    first : (requests,) int32.
    """
    return (requests,)


@kernel
def fail_requests(
    *,
    words: Address,
    reported: Address,
    step: Address,
    requests: I32,
    lengths: Address,
    starts: Address,
    output: Address,
    width: I32,
) -> Grid:
    """Move the words of tokens that could not be stored to `reported`, and make their requests' outputs NaN from them on.

    Parameters
    ----------
    words : (2, requests) words of `BadToken`, a request's each: of the model's layers, and of a drafter's, which fail nothing.
    reported : (4, 2, requests) words, of which those at `step` modulo 4 are written where there is none; may be page-locked
        memory of the host.
    step : an int32, the step's number.
    requests : the most that a step has.
    lengths, starts : as in `store_blocks`.
    output : (tokens, width) of 16 bit, contiguous.
    """
    return (1,)


@kernel
def select_blocks(
    *,
    query: Address,
    query_stride: I64,
    blocks: BlocksArguments,
    rows: BlockRows,
    lists: PageListArguments,
    select: BlockSelectArguments,
) -> Grid:
    """Write which pages each row reads, and list the best for rows that are anchors.

    Parameters
    ----------
    query, query_stride : as in `decode_blocks`.
    """
    return (rows.rows * blocks.kv_heads * select.parts,)


@kernel
def decode_blocks(
    grid: int,
    *,
    query: Address,
    query_stride: I64,
    tokens: StepRows,
    blocks: BlocksArguments,
    output: Address,
    lse: Address,
    rows: BlockRows,
    decode: BlockDecodeArguments,
) -> Grid:
    """Attend with the newest tokens of every request, which are `tokens`.

    Parameters
    ----------
    grid : blocks of the grid.
    query : (rows, query_heads, head_dim) of the window's dtype; `query_stride` elements from one row to the next.
    output : the same shape and dtype, contiguous.
    lse : (rows, query_heads) float32 log-sum-exps.
    """
    return (grid,)
