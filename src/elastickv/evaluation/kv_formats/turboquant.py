"""TurboQuant: a random rotation, one codebook for all coordinates, a norm for every token; optionally one bit of residual.

Zandieh et al. 2025 (arXiv 2504.19874), algorithms 1 (MSE) and 2 (inner product). A token's head x is stored as the float16 norm
and the nearest centroids of the coordinates of R x / |x|, which are about normal with variance 1 / head_dim: the Lloyd-Max
codebook for that (as in vLLM 0.33, `vllm/model_executor/layers/quantization/turboquant/centroids.py`). Algorithm 2 spends one
of the bits on the signs of S r, r = what is left, S a Gaussian matrix (QJL, Zandieh et al. 2024, arXiv 2406.03482), read back
as sqrt(pi / 2) / head_dim * |r| * S^T signs, with a float16 |r|; its inner products have no bias. It serves keys; values, which
are summed, take algorithm 1 at the same bits.
"""

from functools import partial
from math import pi, sqrt

import torch

from elastickv.evaluation.kv_formats.lloyd_max import boundaries, normal_codebook
from elastickv.evaluation.kv_formats.reference_format import ReferenceFormat, StoredPlane
from elastickv.evaluation.kv_formats.rotations import gaussian, random_rotation
from elastickv.evaluation.kv_formats.rounding_modes import TINY, to_half
from elastickv.evaluation.prefill import Tensor

_NORM_BYTES = 2
_FLOAT_BYTES = 4
_QJL_SEED = 1


def to_centroids(unit: Tensor, bits: int) -> Tensor:
    """Return unit vectors with their coordinates rounded to the codebook of a normal distribution."""
    codebook = normal_codebook(bits)
    spread = unit.shape[-1] ** -0.5
    edges, centroids = (torch.tensor(numbers).to(unit) * spread for numbers in (boundaries(codebook), codebook))
    return centroids[torch.bucketize(unit.contiguous(), edges)]


def rotated_to_centroids(unit: Tensor, bits: int) -> Tensor:
    """Return unit vectors with the coordinates of their random rotation rounded to the codebook."""
    rotation = random_rotation(unit.shape[-1]).to(unit)
    return to_centroids(unit @ rotation.mT, bits) @ rotation


def residual_signs(residual: Tensor) -> Tensor:
    """Return the estimate of a residual from the signs of its random projections."""
    head_dim = residual.shape[-1]
    projection = gaussian(head_dim, _QJL_SEED).to(residual)
    signs = torch.where(residual @ projection.mT < 0, -1.0, 1.0)
    return sqrt(pi / 2) / head_dim * residual.norm(dim=-1, keepdim=True) * (signs @ projection)


def _mse(x: Tensor, bits: int) -> Tensor:
    norm = x.norm(dim=-1, keepdim=True)
    return to_half(norm) * rotated_to_centroids(x / norm.clamp_min(TINY), bits)


def _inner_product(x: Tensor, bits: int) -> Tensor:
    norm = x.norm(dim=-1, keepdim=True)
    unit = x / norm.clamp_min(TINY)
    rounded = rotated_to_centroids(unit, bits - 1)
    residual = unit - rounded
    size = to_half(residual.norm(dim=-1, keepdim=True))
    return to_half(norm) * (rounded + size * residual_signs(residual / residual.norm(dim=-1, keepdim=True).clamp_min(TINY)))


def _format(bits: int, residual: bool) -> ReferenceFormat:
    def plane(with_residual: bool) -> StoredPlane:
        return StoredPlane(
            partial(_inner_product if with_residual else _mse, bits=bits),
            lambda head_dim: -(-head_dim * bits // 8) + (1 + with_residual) * _NORM_BYTES,
        )

    name = f"turboquant{bits}_qjl" if residual else f"turboquant{bits}"
    algorithm = "algorithm 2 for K, 1 for V" if residual else "algorithm 1"
    centroids = sum(2**b for b in {bits, bits - residual})
    return ReferenceFormat(
        name,
        plane(residual),
        plane(False),
        f"TurboQuant (arXiv 2504.19874), {algorithm}",
        shared_bytes=lambda head_dim: (centroids + (1 + residual) * head_dim**2) * _FLOAT_BYTES,
    )


TURBOQUANT2, TURBOQUANT3, TURBOQUANT4 = (_format(bits, residual=False) for bits in (2, 3, 4))
TURBOQUANT2_QJL, TURBOQUANT3_QJL, TURBOQUANT4_QJL = (_format(bits, residual=True) for bits in (2, 3, 4))
