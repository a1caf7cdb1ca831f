"""Which keys the prompt chunks of a step read, and in how many parts."""

from dataclasses import dataclass, replace

import torch

from elastickv.recipe.formats import PAGE_TOKENS
from elastickv.vllm.step_metadata import PageMetadata

# Whose keys and values are dequantized at a time: 128 MiB for 8 KV heads of 128 channels.
_PACKED_TOKENS = 32768


def most_packed_tokens(requests: int, tokens: int) -> int:
    """Return the most tokens of a packed part, of all requests together, in steps of so many requests and tokens.

    Tiles have at least a page of each request; what windows leave behind is read at once, and is no more than the chunks.
    """
    return max(_PACKED_TOKENS, requests * PAGE_TOKENS, tokens)


@dataclass(frozen=True)
class KeyRange:
    """Keys of each request that one launch reads.

    Attributes
    ----------
    first, count : (requests,) int32, the first token and the number of tokens.
    start : (requests + 1,) int32, where each request's rows begin in a contiguous tensor, and the end of the last.
    rows, longest : the end of the last; the most tokens of a request.
    causal : whether the newest query of a request sees the last key, and each older query one key less.
    """

    first: torch.Tensor
    count: torch.Tensor
    start: torch.Tensor
    rows: int
    longest: int
    causal: bool

    @classmethod
    def of(cls, first: list[int], count: list[int], device: torch.device, causal: bool) -> "KeyRange":
        """Return the range for lists of one number a request."""
        start = [0]
        for n in count:
            start.append(start[-1] + n)
        sent = torch.tensor([*first, *count, *start], dtype=torch.int32).to(device, non_blocking=True)
        requests = len(first)
        parts = sent[:requests], sent[requests : 2 * requests], sent[2 * requests :]
        return cls(*parts, rows=start[-1], longest=max(count), causal=causal)


@dataclass(frozen=True)
class ChunkPlan:
    """The parts of attention of prompt chunks that follow each other in a step.

    A query at position t reads tokens j > t - exact_tokens exactly: those of its own chunk and of the window before it. It
    reads the others from pages. All queries of a chunk see the pages before the first one's window; after that, each sees one
    token more than the one before.

    Attributes
    ----------
    first_request, requests : rows of the batch.
    tokens : of the step.
    query_start : (requests + 1,) int32, where each request's queries begin.
    longest : most queries of a request.
    tails : the window before each chunk.
    chunk_rows : (tokens,) int64, where the chunks' own keys belong behind the tails; None if there is no tail.
    exact : tails and chunks together.
    packed : parts that are read from pages.
    never : (requests,) int32, beyond every token.
    """

    first_request: int
    requests: int
    tokens: slice
    query_start: torch.Tensor
    longest: int
    tails: KeyRange
    chunk_rows: torch.Tensor | None
    exact: KeyRange
    packed: list[KeyRange]
    never: torch.Tensor

    @classmethod
    def all_of(cls, batch: PageMetadata, exact_tokens: int, scratch_tokens: int, device: torch.device) -> "list[ChunkPlan]":
        """Return the plans of a step's chunks.

        Parameters
        ----------
        scratch_tokens : most tokens of a packed part, by `most_packed_tokens`. Chunks and the windows before them have no more
            in a plan, but for the window of a chunk alone.
        """
        plans, first, held = [], batch.decodes, 0
        for request in range(batch.decodes, batch.requests):
            count = batch.starts_list[request + 1] - batch.starts_list[request]
            exact = min(batch.lengths_list[request], count + exact_tokens - 1)
            if request > first and held + exact > scratch_tokens:
                plans.append(cls.of(batch, first, request, exact_tokens, scratch_tokens, device))
                first, held = request, 0
            held += exact
        return [*plans, cls.of(batch, first, batch.requests, exact_tokens, scratch_tokens, device)]

    @classmethod
    def of(
        cls, batch: PageMetadata, first: int, end: int, exact_tokens: int, scratch_tokens: int, device: torch.device
    ) -> "ChunkPlan":
        """Return the plan of the chunks of requests `first` to `end` - 1."""
        starts, lengths = batch.starts_list[first : end + 1], batch.lengths_list[first:end]
        counts = [after - before for before, after in zip(starts, starts[1:], strict=False)]
        before = [length - count for length, count in zip(lengths, counts, strict=True)]
        tails = [min(n, exact_tokens - 1) for n in before]
        exact = [tail + count for tail, count in zip(tails, counts, strict=True)]
        reach = KeyRange.of([0] * len(counts), exact, device, True)
        rows = None
        if any(tails):
            own, row = [], 0
            for tail, count in zip(tails, counts, strict=True):
                own.append(torch.arange(row + tail, row + tail + count))
                row += tail + count
            rows = torch.cat(own).to(device, non_blocking=True)
        return cls(
            first_request=first,
            requests=len(counts),
            tokens=slice(starts[0], starts[-1]),
            query_start=batch.starts[first : end + 1] - batch.starts[first],
            longest=max(counts),
            tails=replace(
                KeyRange.of([n - tail for n, tail in zip(before, tails, strict=True)], tails, device, False),
                start=reach.start,  # its own tokens follow each tail
            ),
            chunk_rows=rows,
            exact=reach,
            packed=list(_packed(before, lengths, exact_tokens, scratch_tokens, device)),
            never=torch.full((len(counts),), 2**31 - 1, dtype=torch.int32, device=device),
        )


def _packed(
    before: list[int], lengths: list[int], exact_tokens: int, scratch_tokens: int, device: torch.device
) -> "list[KeyRange]":
    """Return the ranges below every query's window, in tiles, then the range that the windows leave behind."""
    seen_by_all = [max(0, n - exact_tokens + 1) for n in before]
    ends = [max(0, length - exact_tokens) for length in lengths]
    ranges = []
    share = max(scratch_tokens // len(before) // PAGE_TOKENS * PAGE_TOKENS, PAGE_TOKENS)
    for tile in range(0, max(seen_by_all), share):
        count = [min(max(n - tile, 0), share) for n in seen_by_all]
        ranges.append(KeyRange.of([min(tile, n) for n in seen_by_all], count, device, False))
    left = [end - n for n, end in zip(seen_by_all, ends, strict=True)]
    if any(n > 0 for n in left):
        ranges.append(KeyRange.of(seen_by_all, [max(n, 0) for n in left], device, True))
    return ranges
