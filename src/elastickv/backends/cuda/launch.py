"""One typed function per kernel of `kernels/`: its arguments by name, with the types that it is compiled with.

Those over the blocks of a serving engine are in `block_launch.py`.

A function's keyword-only parameters are the kernel's arguments, in the kernel's order and under the kernel's names. A struct
stands for its fields. Positional parameters only size the grid, which the function returns; `kernel` turns it into a launch.
`tests/backends/cuda/test_launch.py` compares each with the signature of the compiled kernel.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeAlias, get_args, get_type_hints

from elastickv.backends.cuda.arguments import (
    I32,
    I64,
    U64,
    Address,
    ArgumentStruct,
    DecodeArguments,
    FeedbackArguments,
    QueryArguments,
    RowTarget,
    SelectArguments,
    StoreArguments,
    TokenRows,
    pack,
)
from elastickv.backends.cuda.device import Argument, CudaDevice
from elastickv.backends.cuda.kernel_selection import Variant
from elastickv.recipe import PAGE_TOKENS

Grid: TypeAlias = tuple[int, ...]
P = ParamSpec("P")

_MOST_GRID_Z = 65535
_MOST_BLOCKS = 4096
_COPY_BLOCKS = 64
_FILL_BLOCKS = 16384
_WARPS = 8  # of a block of the kernels that store, read and move tokens


@cache
def _parameters(grid_of: Callable[..., Grid]) -> dict[str, Any]:
    """Return the annotations of the keyword-only parameters."""
    hints, parameters = get_type_hints(grid_of, include_extras=True), inspect.signature(grid_of).parameters.values()
    return {p.name: hints[p.name] for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def kernel_arguments(launch: Callable[..., None]) -> Iterator[tuple[str, type]]:
    """Yield the name and C type of each argument of a launch's kernel, fields of structs included."""
    for name, annotation in _parameters(inspect.unwrap(launch)).items():
        if isinstance(annotation, type) and issubclass(annotation, ArgumentStruct):
            yield from ((field, get_args(each)[1]) for field, each in annotation.types.items())
        else:
            yield name, get_args(annotation)[1]


def kernel(grid_of: Callable[P, Grid]) -> Callable[Concatenate[CudaDevice, Variant, P], None]:
    """Return the launch of the kernel that `grid_of` is named after, on a device's stream, built as a variant."""

    @wraps(grid_of)
    def launch(device: CudaDevice, variant: Variant, /, *sizes: P.args, **arguments: P.kwargs) -> None:
        grid = grid_of(*sizes, **arguments)
        packed: list[Argument] = []
        for name, annotation in _parameters(grid_of).items():
            value = arguments[name]
            if isinstance(value, ArgumentStruct):
                packed += value.packed
            else:
                packed.append(pack(annotation, value))
        device.launch(variant, grid_of.__name__, grid, packed)

    return launch


def _blocks(tokens: int, per_block: int) -> int:
    return max(1, min(-(-tokens // per_block), _MOST_BLOCKS))


# kernels/append.cu


def _fill_grid(longest: int, heads: int) -> Grid:
    blocks = min(-(-longest // _WARPS), _FILL_BLOCKS // heads + 1)
    return max(1, blocks), 2, min(heads, _MOST_GRID_Z)


@kernel
def fill_random(longest: int, *, store: StoreArguments, state: Address, heads: I32, seed: U64) -> Grid:
    """Store seeded random normal tokens in sequences of up to `longest` tokens: the lengths in `state`."""
    return _fill_grid(longest, heads)


@kernel
def fill_pages(longest: int, *, store: StoreArguments, state: Address, heads: I32, seed: U64) -> Grid:
    """Store the cold pages of the same tokens as `fill_random`."""
    return _fill_grid(longest, heads)


@kernel
def set_state(*, state: Address, lengths: Address, kv_heads: I32, heads: I32, step: I32, bad: Address, all_finite: I32) -> Grid:
    """Set every sequence's length and step; forget values that were not finite: all, or those beyond the lengths."""
    return (-(-heads // 256),)


@kernel
def append(heads: int, *, store: StoreArguments, state: Address, capacity: I32, feedback: FeedbackArguments) -> Grid:
    """Store the token that the previous layer's outputs make, and leave the queries of the next decode."""
    return heads, 2


@kernel
def append_rows(
    heads: int,
    *,
    store: StoreArguments,
    state: Address,
    capacity: I32,
    tokens: TokenRows,
    kv_heads: I32,
    queries: QueryArguments,
) -> Grid:
    """Store one token per sequence, and leave the queries of the next decode."""
    return heads, 2


# kernels/edit.cu


@kernel
def extend_cold(
    longest: int, *, store: StoreArguments, state: Address, added: Address, kv_heads: I32, heads: I32, tokens: TokenRows
) -> Grid:
    """Store what becomes cold when sequence b grows by its first added[b] of up to `longest` tokens."""
    return _blocks(longest, PAGE_TOKENS), 2, min(heads, _MOST_GRID_Z)


@kernel
def extend_exact(
    longest: int, *, store: StoreArguments, state: Address, added: Address, kv_heads: I32, heads: I32, tokens: TokenRows
) -> Grid:
    """Store the tokens of the same growth that stay exact; follows `extend_cold`, whose source rows it overwrites."""
    return _blocks(longest, _WARPS), 2, min(heads, _MOST_GRID_Z)


@kernel
def read_rows(*, store: StoreArguments, state: Address, heads: I32, first: I32, last: I32, target: RowTarget) -> Grid:
    """Write tokens `first` to `last` - 1 as they are stored to `target`."""
    return _blocks(last - first, PAGE_TOKENS) + 1, 2, min(heads, _MOST_GRID_Z)


@kernel
def crop_rows(removed: int, *, store: StoreArguments, state: Address, lengths: Address, kv_heads: I32, heads: I32) -> Grid:
    """Prepare every sequence for its first lengths[b] tokens, up to `removed` fewer: cold ones become exact rows again."""
    return _blocks(removed, PAGE_TOKENS), 2, min(heads, _MOST_GRID_Z)


@kernel
def copy_rows(n_planes: int, *, planes: Address, from_rows: Address, to_rows: Address, kv_heads: I32, heads: I32) -> Grid:
    """Copy sequence from_rows[i] of some planes to sequence to_rows[i] of others; `planes` is an array of `Plane`."""
    return _COPY_BLOCKS, n_planes, min(heads, _MOST_GRID_Z)


# kernels/rotate.cu, kernels/select.cu and kernels/decode_*.cu


@kernel
def rotate_rows(*, source: Address, output: Address, rows: I32, output_type: I32) -> Grid:
    """Rotate float32 rows of a head, and write them as `output_type`, a value of `kernel_selection.TYPES`; in place, too."""
    return (-(-rows // _WARPS),)


@kernel
def select(blocks: int, heads: int, *, query: Address, cache: SelectArguments, after_append: I32) -> Grid:
    """List the best pages of every (sequence, KV head), at anchors.

    `after_append`: exactly one token was appended since the last decode, so the predicted step holds.
    """
    return blocks, heads


@kernel
def decode(blocks: int, *, query: Address, output: Address, lse: Address, cache: DecodeArguments, output_type: I32) -> Grid:
    """Attend with one query per sequence and query head; every decode variant has this signature.

    Parameters
    ----------
    blocks : blocks of the grid.
    query : (heads, group, head_dim) float32.
    output : the same shape, of `output_type`, a value of `kernel_selection.TYPES`.
    lse : (heads, group) float32 log-sum-exps.
    cache : buffers, recipe and sizes of the cache.
    """
    return (blocks,)


# kernels/ceilings.cu


@kernel
def read(blocks: int, *, source: Address, vectors: I64, sink: Address) -> Grid:
    """Read 16-byte vectors; every warp streams lines of its own."""
    return (blocks,)


@kernel
def read_chunks(blocks: int, *, source: Address, vectors: I64, sink: Address) -> Grid:
    """Read 16-byte vectors; every block streams one contiguous chunk."""
    return (blocks,)


@kernel
def copy(blocks: int, *, source: Address, target: Address, vectors: I64) -> Grid:
    """Copy 16-byte vectors."""
    return (blocks,)


@kernel
def multiply_add(blocks: int, *, sink: Address) -> Grid:
    """Run chains of dependent multiply-adds."""
    return (blocks,)
