"""Attention over blocks on the CPU: our kernels decode and store; PyTorch serves prompt chunks."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elastickv.backends.bad_token import NO_BAD_TOKEN, REPORTED_STEPS, BadToken
from elastickv.backends.cpu.blocks import open_block_kernels
from elastickv.backends.cpu.blocks.host_blocks import HostBlocks, Table
from elastickv.recipe import FORMATS, PAGE_TOKENS, AttentionShape, Recipe
from elastickv.recipe.shape import MAX_CONTEXT
from elastickv.vllm.bad_tokens import BadTokens
from elastickv.vllm.block_attention import LayerStep
from elastickv.vllm.selection.decode_selection import DecodeSelection, Requests, SelectedPages

FINITE = torch.finfo(torch.float32).max
_QUERIES = 512  # of a chunk that attend at a time


class CpuAttention:
    """Attention over blocks in host memory, without copies of them.

    Parameters
    ----------
    shape : of the layers' attention; its batch is not used.
    dtype : 'fp32', 'bf16' or 'fp16', of the model and of the window.
    recipe : formats of the pages; its window is the number of exact tokens.
    scale : of scores.

    Raises
    ------
    UsageError : if no kernel supports the combination.
    """

    def __init__(self, shape: AttentionShape, dtype: str, recipe: Recipe, scale: float) -> None:
        every_page = replace(recipe, selection="all", fractions=())  # rows of `SelectedPages` say what is read
        self._kernels = open_block_kernels(shape, dtype, every_page, recipe.window)
        self._exact_tokens, self._scale = recipe.window, scale
        self._largest_key = FORMATS[str(recipe.key_format)].largest_key or FINITE
        self.slab_bytes = self._kernels.slab_bytes

    def reserve(self, tokens: int) -> None:
        """Allocate nothing: scratch memory is small."""

    def find_first(
        self, block_table: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor, block_tokens: int, first: torch.Tensor
    ) -> None:
        """Write `WindowMetadata.first`: the end of the newest block that is gone, rounded up to a page."""
        before = lengths[: len(first)] - starts[1 : len(first) + 1] + starts[: len(first)]
        oldest = torch.clamp(before - (self._exact_tokens - 1), min=0) // block_tokens
        most_blocks = -(-(self._exact_tokens - 1) // block_tokens) + 1  # of a window, which may begin inside a block
        columns = oldest[:, None] + torch.arange(most_blocks)
        blocks = block_table[: len(first)].gather(1, torch.clamp(columns, max=block_table.shape[1] - 1).long())
        gone = (blocks == 0) & (columns * block_tokens < before[:, None])
        after = torch.where(gone, (columns + 1) * block_tokens, 0).amax(dim=1)
        pages = torch.minimum((after + PAGE_TOKENS - 1) // PAGE_TOKENS, before // PAGE_TOKENS)
        first.copy_(pages * PAGE_TOKENS)

    def store(self, step: LayerStep) -> None:
        """Store a step's tokens in the window and quantize the pages that they complete."""
        batch = step.batch
        self._report_bad(step)
        tables = array(batch.lengths), array(batch.starts), array(step.recent.slot_mapping)
        self._kernels.store(_blocks(step), array(step.keys), array(step.values), *tables)

    def _report_bad(self, step: LayerStep) -> None:
        """Leave the first token of each request that cannot be stored in its word, as CUDA's kernels do."""
        keys, values = step.keys[: step.batch.tokens], step.values[: step.batch.tokens]
        # Comparisons with NaN are false.
        if float(keys.abs().amax()) <= self._largest_key and float(values.abs().amax()) <= FINITE:
            return
        stored = (keys.abs() <= self._largest_key) & (values.abs() <= FINITE)
        starts, lengths = step.batch.starts, step.batch.lengths
        rows = (~stored.flatten(1).all(1)).nonzero().flatten()
        requests, counts = torch.searchsorted(starts[1:].contiguous(), rows, right=True).unique_consecutive(return_counts=True)
        firsts = rows[counts.cumsum(0) - counts]
        for request, row in zip(requests.tolist(), firsts.tolist(), strict=True):
            position = int(lengths[request] - starts[request + 1]) + row
            finite = bool(torch.isfinite(keys[row]).all() and torch.isfinite(values[row]).all())
            word, before = BadToken(step.layer, position, too_large=finite).word, int(step.bad[request])
            step.bad[request] = word if before == NO_BAD_TOKEN else min(before, word)

    def fail(self, step: LayerStep, bad: BadTokens, output: torch.Tensor) -> None:
        """Make outputs NaN from the tokens on that could not be stored, and log them."""
        words = bad.words
        if bool((words == NO_BAD_TOKEN).all()):
            return
        for request, token in enumerate(map(BadToken.of, words[0, : step.batch.requests].tolist())):
            if token is not None:
                end = int(step.batch.starts[request + 1])
                output[end - (int(step.batch.lengths[request]) - token.position) : end] = torch.nan
        reported = bad.reported[int(bad.step) % REPORTED_STEPS]
        reported.copy_(torch.where(reported == NO_BAD_TOKEN, words, reported))
        words.fill_(NO_BAD_TOKEN)
        bad.look()

    def decode(self, step: LayerStep, query: torch.Tensor, output: torch.Tensor) -> None:
        """Attend with the tokens of decodes: (tokens, query_heads, head_size) each."""
        part = _Part.of(step, range(step.batch.decodes))
        self._attend_rows(part, query, output, self._selected(step, part, query))

    def _selected(self, step: LayerStep, part: "_Part", query: torch.Tensor) -> SelectedPages | None:
        """Return what the rows of some requests read, with the pages of new lists in them; None: every page."""
        requests = part.requests
        if step.selection is None or requests is None:
            return None
        assert isinstance(step.selection, DecodeSelection)
        selected = step.selection.plan(requests)
        if selected is not None and len(selected.anchors):
            self._kernels.list_pages(part.blocks, array(query), selected.anchors)
            step.selection.keep(requests, selected)
        return selected

    def _attend_rows(
        self, part: "_Part", query: torch.Tensor, output: torch.Tensor, selected: SelectedPages | None = None
    ) -> None:
        self._kernels.decode(
            part.blocks,
            array(part.keys),
            array(part.values),
            array(query),
            array(output),
            part.lengths,
            part.starts,
            part.first,
            self._scale,
            None if selected is None else selected.rows,
        )

    def prefill(self, step: LayerStep, query: torch.Tensor, output: torch.Tensor) -> None:
        """Attend with the tokens of prompt chunks to dequantized pages, the window and the chunk, one request at a time.

        Tokens that a request generated before it was preempted are in its chunk too: from the first on that reads a list of
        pages, they attend as decodes do.
        """
        batch = step.batch
        for request in range(batch.decodes, batch.requests):
            start, end = batch.starts_list[request : request + 2]
            if start == end:
                continue
            rows = slice(start - batch.decode_tokens, end - batch.decode_tokens)
            own_query, own_output, part = query[rows], output[rows], _Part.of(step, range(request, request + 1))
            selected = self._selected(step, part, own_query)
            whole = len(own_query) if selected is None else selected.skip_every_page()
            if whole:
                self._attend_chunk(step, request, slice(start, end), own_query[:whole], own_output[:whole])
            if whole < len(own_query):
                self._attend_rows(part, own_query, own_output, selected)

    def _attend_chunk(self, step: LayerStep, request: int, rows: slice, query: torch.Tensor, output: torch.Tensor) -> None:
        """Attend with the first tokens of a chunk, which has the step's `rows`."""
        length, present = int(step.batch.lengths[request]), int(step.recent.first[request])
        assert length == step.batch.lengths_list[request], "vLLM says another length on the host"
        before = length - (rows.stop - rows.start)
        exact_from = max(before - self._exact_tokens + 1, present, 0)
        packed = max(length - self._exact_tokens, exact_from if present else 0, 0)
        keys, values = self._read(step, request, rows, packed, exact_from, before)
        positions = torch.cat([torch.arange(packed), torch.arange(exact_from, length)])
        exact = torch.arange(len(positions)) >= packed
        for first in range(0, len(query), _QUERIES):
            part = slice(first, first + _QUERIES)
            at = before + torch.arange(first, min(first + _QUERIES, len(query)))[:, None]
            # The window of a query begins after this token.
            boundary = torch.clamp(at - self._exact_tokens, min=present - 1)
            mask = torch.where(exact, (positions > boundary) & (positions <= at), positions <= boundary)
            attended = torch.nn.functional.scaled_dot_product_attention(
                query[part].transpose(0, 1), keys, values, attn_mask=mask, scale=self._scale, enable_gqa=True
            )
            output[part] = attended.transpose(0, 1)

    def _read(
        self, step: LayerStep, request: int, rows: slice, packed: int, exact_from: int, before: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first `packed` tokens from pages, then exact ones: (kv_heads, tokens, head_size) each."""
        tail = max(before - exact_from, 0)
        shape = (packed + tail, *step.keys.shape[1:])
        stored = step.keys.new_empty(shape), step.values.new_empty(shape)
        blocks = _blocks(step)
        for first, count, exact in ((0, packed, False), (exact_from, tail, True)):
            if count:
                part = slice(packed, None) if exact else slice(packed)
                self._kernels.gather(blocks, [request], [first], [count], exact, *(array(each[part]) for each in stored))
        pairs = zip(stored, (step.keys, step.values), strict=True)
        # A weight of 0 times NaN would be NaN: tokens before a bad one of their chunk do not read it.
        keys, values = (torch.cat([old, new[rows]]).nan_to_num_(0.0, 0.0, 0.0) for old, new in pairs)
        return keys.transpose(0, 1), values.transpose(0, 1)


@dataclass(frozen=True)
class _Part:
    """Requests of a step that follow each other, as kernels take them; rows are counted from the first one's."""

    blocks: HostBlocks
    keys: torch.Tensor
    values: torch.Tensor
    lengths: Table
    starts: Table
    first: Table
    requests: Requests | None

    @classmethod
    def of(cls, step: LayerStep, requests: range) -> "_Part":
        """Return some requests of a step."""
        batch, rows = step.batch, slice(requests.start, requests.stop)
        starts: Table = array(batch.starts)[requests.start : requests.stop + 1]
        own = slice(int(starts[0]), int(starts[-1]))
        lengths, starts = array(batch.lengths)[rows], starts - starts[0]
        selecting = None
        if batch.prompts is not None:
            prompts, table = batch.prompts[rows].numpy().astype(np.int64), array(batch.block_table)[rows]
            ratios = {request - requests.start: ratio for request, ratio in batch.ratios.items() if request in requests}
            prompts[[request for request, ratio in ratios.items() if ratio == 1]] = MAX_CONTEXT  # they read every page
            selecting = Requests(lengths, starts, prompts, table, ratios)
        first = array(step.recent.first)[rows]
        return cls(_blocks(step, rows), step.keys[own], step.values[own], lengths, starts, first, selecting)


def array(tensor: torch.Tensor) -> NDArray[Any]:
    """Return a view of a tensor; bfloat16 as the bits of it, uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _blocks(step: LayerStep, requests: slice = slice(None)) -> HostBlocks:
    pages, window = step.batch.block_table[requests], step.recent.block_table[requests]
    return HostBlocks(
        pages=step.pages.data_ptr(),
        page_stride=step.pages.stride(0),
        slab_stride=step.slab_bytes,
        window=step.window.data_ptr(),
        window_stride=step.window.stride(0),
        page_table=array(pages),
        window_table=array(window),
        kv_heads=step.pages.shape[1],
        window_shift=step.window_shift,
    )
