"""The rotation of heads that a recipe's `rotate` names: a fast Walsh-Hadamard transform, bit for bit that of every backend.

An orthonormal, symmetric matrix is its own inverse. Scores are the same when queries and keys are rotated, and a rotated sum of
values is the sum of rotated values: what is stored changes, and attention does not, but for the rounding of what is stored.
A few large channels become a little of every channel of their block, which suits formats whose channels share a scale.
"""

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from elastickv.kvcache.protocol import StoredHead
from elastickv.recipe import Recipe

Rows = TypeVar("Rows", NDArray[np.float32], NDArray[np.float64])


def rotated_block(head_dim: int) -> int:
    """Return the channels that are rotated together: the largest power of two that divides the head."""
    return head_dim & -head_dim


def rotated(rows: Rows) -> Rows:
    """Return rows with every block of `rotated_block` channels multiplied by the Walsh-Hadamard matrix (Sylvester's order).

    Sums of pairs of channels whose numbers differ by 1, 2, 4 and so on, then a product with 1 / sqrt(block): in this order, so
    that float32 rounds alike on every backend.

    Parameters
    ----------
    rows : (..., head_dim) float32 or float64.

    Returns
    -------
    rotated : the same shape and dtype. An infinity makes NaN and infinities of its block, and sums may overflow to one.
    """
    size = rotated_block(rows.shape[-1])
    x, step = rows.reshape(-1, size), 1
    with np.errstate(invalid="ignore", over="ignore"):
        while step < size:
            pairs = x.reshape(-1, size // (2 * step), 2, step)
            first, second = pairs[:, :, 0], pairs[:, :, 1]
            x = np.stack([first + second, first - second], axis=2)
            step *= 2
        return np.asarray(x * rows.dtype.type(1 / math.sqrt(size)), rows.dtype).reshape(rows.shape)


def rotated_tokens(keys: Rows, values: Rows, recipe: Recipe) -> tuple[Rows, Rows]:
    """Return keys and values, each rotated if the recipe stores it so; what is rotated already is rotated back."""
    return rotated(keys) if recipe.rotates_keys else keys, rotated(values) if recipe.rotates_values else values


def rotated_head(stored: StoredHead, recipe: Recipe) -> StoredHead:
    """Return the tokens of a head as `LayerCache.stored` has them, of those that are stored."""
    cold = rotated_tokens(stored.cold_keys, stored.cold_values, recipe)
    return StoredHead(*cold, *rotated_tokens(stored.exact_keys, stored.exact_values, recipe))
