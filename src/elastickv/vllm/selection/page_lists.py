"""Lists of pages, by the block and the position of the token that chose them."""

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from elastickv.backends.cpu.blocks.host_blocks import Table

Int64Array = NDArray[np.int64]


class PageLists:
    """Lists of one layer by the block and the position of their anchors; the blocks used least recently are forgotten.

    Parameters
    ----------
    most_blocks : blocks that may have lists.
    """

    def __init__(self, most_blocks: int) -> None:
        self._most, self._blocks = most_blocks, OrderedDict[int, dict[int, tuple[bytes, Table]]]()

    def find(self, block: int, anchor: int, counts: Int64Array) -> Table | None:
        """Return the list of an anchor, (kv_heads, pages); None where there is none of so many pages for each KV head."""
        lists = self._blocks.get(block)
        if lists is None or anchor not in lists:
            return None
        self._blocks.move_to_end(block)
        of_counts, pages = lists[anchor]
        return pages if of_counts == counts.tobytes() else None

    def keep(self, block: int, anchor: int, counts: Int64Array, pages: Table) -> None:
        """Keep a list, (kv_heads, pages), of which each KV head has so many."""
        self._blocks.setdefault(block, {})[anchor] = counts.tobytes(), pages
        self._blocks.move_to_end(block)
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)

    def forget(self, block: int, first: int, end: int) -> None:
        """Forget the lists of anchors at positions from `first` to `end` - 1."""
        lists = self._blocks.get(block)
        if lists is not None:
            for anchor in [each for each in lists if first <= each < end]:
                del lists[anchor]
            if not lists:
                del self._blocks[block]
