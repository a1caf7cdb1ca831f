"""Which pages a request's own tokens read on a CPU: lists that some of them choose, kept with the block of the chooser's token.

A token of a prompt reads every page. Of a request's own tokens, the ones that it generated, the first and every N-th after it
are anchors (`Recipe.steps_since_refresh`): at an anchor each KV head lists the best of the pages that have left the window, and
the tokens up to the next anchor read that list, with the pages that leave the window meanwhile. So what a token reads depends
on its position and its past alone: not on the step that computes it, its drafts, the batch or an earlier preemption.

A list stays with the block of pages that holds its anchor's token, and is forgotten when the token is written anew: whoever
reads the block as its own past, after a move in the batch or a prefix hit, has the list too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastickv.backends.cpu.blocks.host_blocks import EVERY_PAGE, NO_ROW, AnchorField, RowField, Table, address
from elastickv.kvcache.page_counts import selected_pages
from elastickv.recipe import PAGE_TOKENS, Recipe
from elastickv.vllm.selection.page_lists import Int64Array, PageLists
from elastickv.vllm.selection.ratio_shares import Shares

LISTS_OF_REQUEST = 4
"""Blocks with lists that are kept for each request of the largest batch: those of ended requests are among them."""


@dataclass(frozen=True)
class Requests:
    """Requests of a step whose rows attend.

    Attributes
    ----------
    lengths : (requests,) int32, tokens of each with those of the step.
    starts : (requests + 1,) int32, where each one's rows begin.
    prompts : (requests,) tokens of each one's prompt.
    blocks : (requests, columns) int32, the block of each page.
    ratios : request -> its own ratio of dense bytes / bytes read.
    """

    lengths: Table
    starts: Table
    prompts: Int64Array
    blocks: Table
    ratios: Mapping[int, float]


@dataclass(frozen=True)
class SelectedPages:
    """What the rows of a step read.

    Attributes
    ----------
    rows : (rows, fields + kv_heads), `RowField` and pages of the list of each KV head.
    anchors : (anchors, fields + kv_heads), `AnchorField` and pages to list for each KV head.
    lists : memory of the lists, which must stay alive.
    """

    rows: Int64Array
    anchors: Int64Array
    lists: list[Table]

    def skip_every_page(self) -> int:
        """Return how many rows come before the first that reads a list; from now on they do not attend."""
        reading = np.flatnonzero(self.rows[:, RowField.LIST] != EVERY_PAGE)
        first = int(reading[0]) if len(reading) else len(self.rows)
        self.rows[:first, RowField.LIST] = NO_ROW
        return first


class DecodeSelection:
    """Selection of pages in one layer.

    Parameters
    ----------
    recipe : the layer's, of requests that ask for no ratio of their own.
    shares_of_ratio : returns the shares of the pages for a request's own ratio, of all KV heads of the layer.
    kv_heads : numbers of this rank's KV heads.
    offset : by how many steps the layer's anchors come early.
    drafts : most draft tokens of a request in a step, by which its next step may go back.
    requests : the most of a step.
    """

    def __init__(
        self,
        recipe: Recipe,
        shares_of_ratio: Callable[[float], Shares],
        kv_heads: range,
        offset: int,
        drafts: int,
        requests: int,
    ) -> None:
        self._every, self._offset, self._window, self._drafts = recipe.anchor_every, offset, recipe.window, drafts
        self._kv_heads, self._shares_of_ratio = kv_heads, shares_of_ratio
        self._usual = np.array([recipe.fraction(head) for head in kv_heads])
        self.lists = PageLists(LISTS_OF_REQUEST * requests)

    def reserve(self) -> None:
        """Allocate nothing: lists are small."""

    def plan(self, requests: Requests) -> SelectedPages | None:
        """Return what the rows of some requests read; None: every page. Lists of tokens that they write anew are forgotten.

        The caller lists the pages of the anchors, then calls `keep`.
        """
        counts = np.diff(requests.starts).astype(np.int64)
        first = requests.lengths - counts
        self._forget(requests, first)
        if (requests.lengths <= requests.prompts).all():
            return None
        of_row = np.repeat(np.arange(len(counts)), counts)
        positions = first[of_row] + np.arange(len(of_row)) - (requests.starts[:-1] - requests.starts[0])[of_row]
        own = positions - requests.prompts[of_row]
        anchors = self._anchors(positions, own)
        pages = np.maximum(anchors + 1 - self._window, 0) // PAGE_TOKENS
        listed = self._counts(requests.ratios, of_row, pages)
        selects = (own >= 0) & (listed < pages[:, None]).any(axis=1)
        if not selects.any():
            return None
        return self._selected(requests, of_row, positions, anchors, pages, listed, selects)

    def keep(self, requests: Requests, selected: SelectedPages) -> None:
        """Keep the lists of a step's anchors that later steps may read."""
        if self._every == 1:  # every token lists its own
            return
        heads = len(AnchorField)
        for anchor, pages in zip(selected.anchors, selected.lists[0], strict=True):
            request, row = int(anchor[AnchorField.REQUEST]), int(anchor[AnchorField.ROW])
            length, end = int(requests.lengths[request]), int(requests.starts[request + 1] - requests.starts[0])
            position, prompt = length - end + row, int(requests.prompts[request])
            oldest = max(length - 1 - self._drafts, prompt)  # the next step begins after it
            if position >= self._anchor(oldest, prompt):
                longest = int(anchor[heads:].max())
                self.lists.keep(self._block(requests, request, position), position, anchor[heads:], pages[:, :longest].copy())

    def _selected(
        self,
        requests: Requests,
        of_row: Int64Array,
        positions: Int64Array,
        anchors: Int64Array,
        pages: Int64Array,
        listed: Int64Array,
        selects: NDArray[np.bool_],
    ) -> SelectedPages:
        kv_heads = listed.shape[1]
        choosers = np.flatnonzero(selects & (positions == anchors))
        new: Table = np.empty((len(choosers), kv_heads, int(listed[choosers].max(initial=1))), np.int32)
        memory, row_of_anchor = [new], {(int(of_row[row]), int(positions[row])): i for i, row in enumerate(choosers)}
        rows = np.zeros((len(of_row), len(RowField) + kv_heads), np.int64)
        for row in np.flatnonzero(selects).tolist():
            request, anchor = int(of_row[row]), int(anchors[row])
            number, listing = row_of_anchor.get((request, anchor)), None
            if number is not None:
                listing = new[number]
            elif anchor < positions[row]:
                listing = self.lists.find(self._block(requests, request, anchor), anchor, listed[row])
                memory += [] if listing is None else [listing]
            if listing is not None:  # where it is gone, every page is read until the next anchor
                rows[row, : len(RowField)] = address(listing), listing.strides[0], pages[row]
                rows[row, len(RowField) :] = listed[row]
        to_list = np.zeros((len(choosers), len(AnchorField) + kv_heads), np.int64)
        to_list[:, AnchorField.REQUEST], to_list[:, AnchorField.ROW] = of_row[choosers], choosers
        to_list[:, AnchorField.PAGES], to_list[:, AnchorField.HEAD_BYTES] = pages[choosers], new.strides[1]
        to_list[:, AnchorField.TARGET] = address(new) + np.arange(len(choosers)) * new.strides[0]
        to_list[:, len(AnchorField) :] = listed[choosers]
        return SelectedPages(rows, to_list, memory)

    def _anchors(self, positions: Int64Array | np.int64, own: Int64Array | np.int64) -> Int64Array:
        """Return the position of each row's anchor, as `Recipe.steps_since_refresh` says it for the `own`-th token."""
        return np.asarray(positions - np.minimum(np.maximum(own, 0), (own + self._offset) % self._every))

    def _anchor(self, position: int, prompt: int) -> int:
        """Return the position of one row's anchor."""
        return int(self._anchors(np.int64(position), np.int64(position - prompt)))

    def _counts(self, ratios: Mapping[int, float], of_row: Int64Array, pages: Int64Array) -> Int64Array:
        """Return how many pages each KV head of each row lists, (rows, kv_heads)."""
        shares = np.tile(self._usual, (len(of_row), 1))
        for request, ratio in ratios.items():
            shares[of_row == request] = np.take(self._shares_of_ratio(ratio), self._kv_heads)
        return selected_pages(shares, pages[:, None])

    def _forget(self, requests: Requests, first: NDArray[np.int64]) -> None:
        """Forget lists of tokens that are written in the step, and those that no token of theirs reads any more."""
        for request, start in enumerate(first.tolist()):
            length, prompt = int(requests.lengths[request]), int(requests.prompts[request])
            for column in range(start // PAGE_TOKENS, -(-length // PAGE_TOKENS)):
                self.lists.forget(int(requests.blocks[request, column]), start, length)
            if start > prompt and self._anchor(start, prompt) == start:
                before = self._anchor(start - 1, prompt)
                self.lists.forget(self._block(requests, request, before), 0, before + 1)

    @staticmethod
    def _block(requests: Requests, request: int, position: int) -> int:
        return int(requests.blocks[request, position // PAGE_TOKENS])
