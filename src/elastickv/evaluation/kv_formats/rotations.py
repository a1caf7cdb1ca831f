"""Orthogonal rotations of heads. A format rotates what it quantizes and rotates back what it reads.

An engine rotates the query and the output instead, which gives the same attention.
"""

import math
from functools import cache

import numpy as np
import torch

from elastickv.evaluation.prefill import Tensor
from elastickv.kvcache.hadamard import rotated, rotated_block


@cache
def hadamard(size: int) -> Tensor:
    """Return the (size, size) orthonormal, symmetric Walsh-Hadamard matrix (Sylvester); `size` is a power of 2."""
    return torch.from_numpy(rotated(np.eye(size, dtype=np.float32)))


@cache
def random_signs(size: int, seed: int = 0) -> Tensor:
    """Return `size` random signs."""
    return torch.randint(2, (size,), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


@cache
def random_rotation(size: int, seed: int = 0) -> Tensor:
    """Return a (size, size) orthogonal matrix of uniform distribution: Q of a Gaussian matrix, with the signs of R's diagonal.

    Mezzadri 2007, How to generate random matrices from the classical compact groups, section 5.
    """
    q, r = torch.linalg.qr(gaussian(size, seed).double())
    return (q * r.diagonal().sign()).float()


@cache
def gaussian(size: int, seed: int = 0) -> Tensor:
    """Return a (size, size) matrix of independent normal numbers."""
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed))


def by_blocks(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply every block of a head's channels by a matrix, as rows."""
    return (x.unflatten(-1, (-1, len(matrix))) @ matrix.to(x)).flatten(-2)


def rotated_rows(x: Tensor) -> Tensor:
    """Return (..., head_dim) float32 rows rotated as a recipe's `rotate` does, bit for bit as `kvcache.hadamard.rotated`."""
    size = rotated_block(x.shape[-1])
    rows, step = x.reshape(-1, size), 1
    while step < size:
        first, second = rows.view(-1, size // (2 * step), 2, step).unbind(2)
        rows = torch.stack([first + second, first - second], 2).view(-1, size)
        step *= 2
    return (rows * (1 / math.sqrt(size))).view(x.shape)
