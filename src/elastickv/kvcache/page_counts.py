"""Counts of `recipe` for arrays: pages that are selected, and sectors that are read."""

import numpy as np
from numpy.typing import NDArray

from elastickv.recipe.formats import SECTOR_BYTES


def selected_pages(fractions: NDArray[np.float64], pages: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many of `pages` cold pages the fractions read, as `recipe.regions.selected` does; the two are broadcast."""
    return np.minimum(np.maximum((fractions * pages).astype(np.int64), 1), pages)


def whole_sectors(n_bytes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bytes that DRAM moves for contiguous reads, as `recipe.formats.sectors` does, of the same shape."""
    return -(-n_bytes // SECTOR_BYTES) * SECTOR_BYTES
