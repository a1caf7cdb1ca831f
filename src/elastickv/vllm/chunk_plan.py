"""Which keys the prompt chunks of a step read, and in how many parts."""

from dataclasses import dataclass, replace

import torch

from elastickv.recipe.formats import PAGE_TOKENS
from elastickv.vllm.step_metadata import PageMetadata


def scratch_tokens(tile_tokens: int, step_tokens: int, requests: int) -> int:
    """Return the most tokens of a packed part: of a tile, or of the tokens that leave the windows within a step's chunks.

    Parameters
    ----------
    tile_tokens : as `ChunkPlan.of` is given.
    step_tokens, requests : the most of a step.
    """
    return max(tile_tokens, step_tokens, requests * PAGE_TOKENS)


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
    """The parts of attention of a step's prompt chunks.

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
    def all_of(
        cls, batch: PageMetadata, exact_tokens: int, tile_tokens: int, most_tokens: int, device: torch.device
    ) -> "list[ChunkPlan]":
        """Return plans of a step's chunks, which follow each other.

        Parameters
        ----------
        tile_tokens : as `of` is given.
        most_tokens : of chunks and the windows before them in a plan; a chunk alone may have its window more.
        """
        plans, first, held = [], batch.decodes, 0
        for request in range(batch.decodes, batch.requests):
            count = batch.starts_list[request + 1] - batch.starts_list[request]
            exact = min(batch.lengths_list[request], count + exact_tokens - 1)
            if request > first and held + exact > most_tokens:
                plans.append(cls.of(batch, exact_tokens, tile_tokens, device, range(first, request)))
                first, held = request, 0
            held += exact
        return [*plans, cls.of(batch, exact_tokens, tile_tokens, device, range(first, batch.requests))]

    @classmethod
    def of(
        cls, batch: PageMetadata, exact_tokens: int, tile_tokens: int, device: torch.device, requests: range | None = None
    ) -> "ChunkPlan":
        """Return the plan of a step's chunks, or of those of some requests.

        A tile of pages has at most `tile_tokens` tokens of all requests together, but a page of each; `scratch_tokens` says
        what that, and the tokens that leave the windows, come to.
        """
        requests = requests or range(batch.decodes, batch.requests)
        first, end = requests.start, requests.stop
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
            packed=_packed(before, lengths, exact_tokens, tile_tokens, device),
            never=torch.full((len(counts),), 2**31 - 1, dtype=torch.int32, device=device),
        )


def _packed(before: list[int], lengths: list[int], exact_tokens: int, tile_tokens: int, device: torch.device) -> list[KeyRange]:
    """Return the ranges below every query's window, in tiles, then the range that the windows leave behind."""
    seen_by_all = [max(0, n - exact_tokens + 1) for n in before]
    ends = [max(0, length - exact_tokens) for length in lengths]
    ranges = []
    share = max(tile_tokens // len(before) // PAGE_TOKENS * PAGE_TOKENS, PAGE_TOKENS)
    for tile in range(0, max(seen_by_all), share):
        count = [min(max(n - tile, 0), share) for n in seen_by_all]
        ranges.append(KeyRange.of([min(tile, n) for n in seen_by_all], count, device, False))
    left = [end - n for n, end in zip(seen_by_all, ends, strict=True)]
    if any(n > 0 for n in left):
        ranges.append(KeyRange.of(seen_by_all, [max(n, 0) for n in left], device, True))
    return ranges
