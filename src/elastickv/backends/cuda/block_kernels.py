"""Store, decode and gather in the blocks of a serving engine, which owns the memory and the tables."""

import math
from contextlib import nullcontext

from elastickv.backends.cuda.arguments import Address
from elastickv.backends.cuda.block_arguments import (
    BlockDecodeArguments,
    BlockRows,
    BlocksArguments,
    BlockSelectArguments,
    GatherRows,
    PageListArguments,
    StepRows,
)
from elastickv.backends.cuda.block_launch import (
    decode_blocks,
    fail_requests,
    first_in_window,
    gather_blocks,
    select_blocks,
    store_blocks,
)
from elastickv.backends.cuda.device import CudaDevice
from elastickv.backends.cuda.kernel_selection import ONE_BLOCK_PAGES, blocks_variant, parts_of_selection
from elastickv.backends.cuda.storage import Scratch, ScratchSize
from elastickv.kvcache.tensor_view import TensorView
from elastickv.recipe import PAGE_TOKENS, AttentionShape, Recipe
from elastickv.recipe.slab import Slab


class BlockKernels:
    """The kernels for one shape, dtype and pair of formats.

    Calls are queued on the stream that `device` follows and read lengths and tables on the device, so that a captured graph
    serves every step. Calls of one object must run one after the other: they share scratch memory.

    Parameters
    ----------
    shape : of the attention; `batch` is the largest number of query tokens of a `decode`.
    dtype : 'bf16' or 'fp16', of the model and of the window.
    recipe : formats of the pages, and whether decodes read listed pages; nothing else of it is used.
    exact_tokens : newest tokens that are read from the window. At least 32, so that a page is complete before it is read.
    list_capacity : most pages of a request, if decodes read listed pages.

    Raises
    ------
    UsageError : if no kernel supports the combination.
    """

    def __init__(
        self,
        device: CudaDevice,
        shape: AttentionShape,
        dtype: str,
        recipe: Recipe,
        exact_tokens: int,
        list_capacity: int = 0,
    ) -> None:
        assert exact_tokens >= PAGE_TOKENS, "a page would be read before it is complete"
        self.slab = Slab.of(recipe, shape.head_dim)
        self._device, self._shape, self._exact_tokens = device, shape, exact_tokens
        self._decoding = blocks_variant(shape.head_dim, shape.group, dtype, recipe, device.arch)
        self._storing = self._decoding.storing_blocks()
        self._grid = device.multiprocessors * device.blocks_per_multiprocessor(self._decoding, "decode_blocks")
        problems = shape.batch * shape.kv_heads * self._decoding.passes(shape.group)
        self._selecting = self._decoding.selecting_blocks() if recipe.selection == "pages" else None
        self._list_capacity = list_capacity
        scores = self._most_scores() if self._selecting else 0
        self._scratch = Scratch(device, ScratchSize.of(self._decoding, self._grid, problems, scores))
        self._listings = device.allocate(shape.batch * shape.kv_heads * 16 if self._selecting else 0, 0)
        self._lse = device.allocate(shape.batch * shape.query_heads * 4)
        for name in ("store_blocks", "gather_blocks", "first_in_window", "fail_requests"):
            device.kernel(self._storing, name)
        if self._selecting:
            device.kernel(self._selecting, "select_blocks")

    def _parts(self, rows: int) -> int:
        return parts_of_selection(self._list_capacity, rows * self._shape.kv_heads, self._device.multiprocessors)

    def _most_scores(self) -> int:
        """Return how many scores a launch for any number of rows writes at most."""
        rows = self._shape.batch
        if self._list_capacity <= ONE_BLOCK_PAGES:
            rows = max((each for each in range(1, rows + 1) if self._parts(each) > 1), default=0)
        return rows * self._shape.kv_heads * self._list_capacity

    def store(
        self,
        blocks: BlocksArguments,
        tokens: StepRows,
        lengths: Address,
        starts: Address,
        slot_mapping: Address,
        bad: Address,
        requests: int,
        longest: int,
        layer: int = 0,
    ) -> None:
        """Store a step's tokens and quantize the pages that they complete; `block_launch.store_blocks` describes the arguments.

        Parameters
        ----------
        requests, longest : requests, and the most tokens that one has in this step.
        """
        store_blocks(
            self._device,
            self._storing,
            longest,
            tokens=tokens,
            blocks=blocks,
            lengths=lengths,
            starts=starts,
            slot_mapping=slot_mapping,
            bad=bad,
            requests=requests,
            layer=layer,
        )

    def decode(
        self,
        blocks: BlocksArguments,
        tokens: StepRows,
        query: TensorView,
        output: Address,
        lengths: Address,
        window_first: Address,
        queries_per_request: int = 1,
        scale: float | None = None,
        starts: Address = None,
        row_requests: Address = None,
        after_store: bool = False,
        lists: PageListArguments | None = None,
    ) -> None:
        """Attend with the newest tokens of each request, which `store` was given before; see `block_launch.decode_blocks`.

        Parameters
        ----------
        query : (rows, query_heads, head_dim), the newest tokens of each request in their order.
        output : the same shape, contiguous.
        lengths, window_first : as in `BlockRows`.
        queries_per_request : rows of each request. 0: they differ, and `starts` and `row_requests` say whose they are.
        scale : of scores; head_dim^-1/2 by default.
        starts, row_requests : as in `BlockRows`.
        after_store : whether a request may read blocks that another one's tokens of this step are stored in, which a prefix
            hit in the same step is. Without that it reads none that the kernel of `store` writes, and need not wait for it.
        lists : which pages rows read, if decodes read listed pages; anchors among the rows list theirs first.
        """
        scratch, shape = self._scratch, self._shape
        assert (lists is None) == (self._selecting is None)
        rows = BlockRows(
            lengths=lengths,
            window_first=window_first,
            starts=starts,
            row_requests=row_requests,
            rows=query.shape[0],
            queries_per_request=queries_per_request,
            group=shape.group,
            exact_tokens=self._exact_tokens,
        )
        decode = BlockDecodeArguments(
            partial=scratch.partial,
            partial_ml=scratch.partial_ml,
            counters=scratch.counters,
            passes=self._decoding.passes(shape.group),
            scale_log2=math.log2(math.e) * (shape.head_dim**-0.5 if scale is None else scale),
            listings=self._listings if lists else None,
            page_lists=lists.page_lists if lists else None,
            list_capacity=self._list_capacity,
        )
        with self._device.in_order() if after_store else nullcontext():
            if self._selecting and lists:
                assert lists.list_capacity == self._list_capacity
                select_blocks(
                    self._device,
                    self._selecting,
                    query=query.address,
                    query_stride=query.strides[0],
                    blocks=blocks,
                    rows=rows,
                    lists=lists,
                    select=BlockSelectArguments(
                        listings=self._listings,
                        scores=scratch.scores,
                        counters=scratch.counters,
                        parts=self._parts(rows.rows),
                    ),
                )
            decode_blocks(
                self._device,
                self._decoding,
                self._grid,
                query=query.address,
                query_stride=query.strides[0],
                tokens=tokens,
                blocks=blocks,
                output=output,
                lse=self._lse,
                rows=rows,
                decode=decode,
            )

    def gather(
        self, blocks: BlocksArguments, rows: GatherRows, keys: Address, values: Address, requests: int, longest: int
    ) -> None:
        """Write stored tokens of `requests` requests, up to `longest` each, to rows of the model's dtype.

        Tokens from `exact_first` on are copies of the window's rows, earlier ones the numbers of their pages.

        Parameters
        ----------
        keys, values : (rows, kv_heads, head_dim), contiguous and aligned to 16 bytes.
        """
        if requests and longest:
            gather_blocks(self._device, self._storing, longest, requests, keys=keys, values=values, blocks=blocks, rows=rows)

    def find_first(self, blocks: BlocksArguments, lengths: Address, starts: Address, first: Address, requests: int) -> None:
        """Write what `decode` takes as `window_first`; `block_launch.first_in_window` describes the arguments."""
        first_in_window(
            self._device,
            self._storing,
            requests,
            blocks=blocks,
            lengths=lengths,
            starts=starts,
            exact_tokens=self._exact_tokens,
            first=first,
        )

    def fail(
        self,
        words: Address,
        reported: Address,
        step: Address,
        requests: int,
        lengths: Address,
        starts: Address,
        output: Address,
    ) -> None:
        """Make outputs of requests NaN whose tokens `store` could not store: `block_launch.fail_requests`.

        Parameters
        ----------
        output : (tokens, query_heads, head_dim), of the window's dtype, contiguous.
        """
        fail_requests(
            self._device,
            self._storing,
            words=words,
            reported=reported,
            step=step,
            requests=requests,
            lengths=lengths,
            starts=starts,
            output=output,
            width=self._shape.query_heads * self._shape.head_dim,
        )
