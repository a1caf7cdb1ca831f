"""Ways to quantize keys and values that `format_study.py` compares: what is stored, and how the encoder chooses it.

Tensors are (layers, windows, KV heads, tokens, head_dim) float32: a variant is applied to all layers and windows at once.
"""

import re
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from elastickv.errors import UsageError
from elastickv.evaluation.kv_formats.rotations import by_blocks, hadamard
from elastickv.evaluation.tensor_codecs import channel_scales
from elastickv.kvcache.hadamard import rotated_block

Tensor: TypeAlias = Any
PAGES = (32, 64, 128)
TRANSFORMS = ("hadamard", "smooth", "balanced")
SCALES = ("log8", "zero8", "symmetric")
STEPS_PER_OCTAVE = 12  # of an 8-bit logarithmic scale: from 2^-16 to 2^5
LEAST_SCALE = 2.0**-24
ACCEPTED = (
    f"k2 to k8 and a page ({', '.join(f'k4/{page}' for page in PAGES)}), or v2 to v8; then any of "
    f"{', '.join(TRANSFORMS)}; hessian; log8, zero8 (values only) or symmetric"
)


@dataclass(frozen=True)
class Variant:
    """One way to store keys or values.

    Attributes
    ----------
    tensor : 'k' or 'v'.
    bits : of a code.
    page : tokens of a channel of K that share a scale; 0 for V, where a token's head shares one.
    transform : 'none', 'hadamard', 'smooth' or 'balanced', as `transform_matrix` has them.
    hessian : whether codes are chosen one channel after the other, as `rounded_in_turn` does; else each is the nearest one.
    scales : words of `SCALES`. log8: a scale takes 8 bits on a logarithmic grid, else it is float16. zero8: the zero takes 8
        bits in fractions of a step. symmetric: no zero is stored.
    """

    tensor: str
    bits: int
    page: int
    transform: str = "none"
    hessian: bool = False
    scales: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, name: str) -> "Variant":
        """Return the variant of a name such as `k4/32 hadamard hessian`.

        Raises
        ------
        UsageError : if it is no name of one.
        """
        head, *words = name.split() or [""]
        shape = re.fullmatch(r"k([2-8])/(\d+)|v([2-8])", head)
        transforms, scales = [word for word in words if word in TRANSFORMS], frozenset(words) & frozenset(SCALES)
        known = len(words) == len({*words}) and {*words} <= {*TRANSFORMS, *SCALES, "hessian"}
        clash = len(transforms) > 1 or {"zero8", "symmetric"} <= scales or ("zero8" in scales and head.startswith("k"))
        if shape is None or not known or clash or (shape[2] and int(shape[2]) not in PAGES):
            raise UsageError(f"variant {name!r} is unknown: give {ACCEPTED}")
        transform = transforms[0] if transforms else "none"
        return cls(head[0], int(shape[1] or shape[3]), int(shape[2] or 0), transform, "hessian" in words, scales)

    def stored_bits(self, head_dim: int) -> float:
        """Return the bits of an element with its share of the scale and the zero."""
        scale = 8 if "log8" in self.scales else 16
        zero = 0 if "symmetric" in self.scales else 8 if "zero8" in self.scales else 16
        return self.bits + (scale + zero) / (self.page or head_dim)


@dataclass(frozen=True)
class Statistics:
    """What a calibration knows of one tensor, (layers, 1, KV heads, head_dim, head_dim) each.

    Attributes
    ----------
    covariance : of the rows, as far as it matters to scales: of K within pages of 32 tokens.
    hessian : of the loss: an error e of a row costs e hessian e^T. E[q q^T] for K, W_o^T W_o of the head for V.
    """

    covariance: Tensor
    hessian: Tensor


def transform_matrix(name: str, statistics: Statistics) -> Tensor:
    """Return (..., head_dim, head_dim) T: rows x T are quantized, and multiplied by the inverse of T when they are read.

    hadamard : the rotation of recipes.
    smooth : channels are multiplied by sqrt(sd of queries / sd of keys), then rotated, as `layer_errors.smoothing`, which
        rounds the factors to powers of 2.
    balanced : makes the covariance and the Hessian one and the same diagonal matrix, then rotates. With C^(1/2) H^(1/2) =
        U S V^T, T = C^(-1/2) U S^(1/2); as the balancing of a linear system (Moore 1981).
    """
    covariance, hessian = statistics.covariance.double(), statistics.hessian.double()
    eye = torch.eye(covariance.shape[-1], dtype=torch.double, device=covariance.device)
    rotation = by_blocks(eye, hadamard(rotated_block(len(eye))).to(eye))
    if name == "hadamard":
        return rotation
    if name == "smooth":
        of_rows, of_loss = (matrix.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12) for matrix in (covariance, hessian))
        return torch.diag_embed((of_loss / of_rows).pow(0.25)) @ rotation
    covariance, hessian = (_damped(matrix, 1e-3) for matrix in (covariance, hessian))
    u, s, _ = torch.linalg.svd(_power(covariance, 0.5) @ _power(hessian, 0.5))
    return (_power(covariance, -0.5) @ u * s.sqrt()[..., None, :]) @ rotation


def _damped(matrix: Tensor, share: float) -> Tensor:
    """Return matrices with a share of the mean of their diagonals added to it."""
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return matrix + share * mean * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Return a power of symmetric positive matrices; eigenvalues below 1e-4 of their mean are raised to it."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.maximum(1e-4 * values.mean(-1, keepdim=True))
    return (vectors * values.pow(exponent)[..., None, :]) @ vectors.mT


def parameters(groups: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
    """Return (..., 1, channels) scales and zeros, as stored, of (..., members, channels) groups. All numbers are in range."""
    levels, low, high = 2**variant.bits - 1.0, groups.amin(-2), groups.amax(-2)
    if "symmetric" in variant.scales:
        high = high.maximum(-low)
        low = -high
    unit = max(16, 2**variant.bits) / 256  # of an 8-bit zero, in steps
    if "zero8" in variant.scales:
        low = low.clamp_max(0)
        levels -= unit
    scales, zeros = channel_scales(torch.stack([low, high], -2), levels)
    if "zero8" in variant.scales:
        scales = scales.maximum(-low / (255 * unit))
    if "log8" in variant.scales:
        # Rounded down where that leaves out less than a quarter of a step of the grid: 1.5 % of the range.
        steps = (scales.clamp_min(LEAST_SCALE).log2() * STEPS_PER_OCTAVE - 0.25).ceil().clamp(-192, 63)
        scales = torch.exp2(steps / STEPS_PER_OCTAVE)
    scales = scales.clamp_min(LEAST_SCALE)
    if "zero8" in variant.scales:
        zeros = (low / (scales * unit)).floor().clamp(-255, 0) * scales * unit
    if "symmetric" in variant.scales:
        zeros = -scales * levels / 2
    return scales[..., None, :], zeros[..., None, :]


def nearest(x: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Return the number that each element's nearest code stands for."""
    return ((x - zeros) / scales).round().clamp(0, 2**bits - 1) * scales + zeros


def rounded_in_turn(rows: Tensor, scales: Tensor, zeros: Tensor, bits: int, hessian: Tensor) -> Tensor:
    """Return what rows are read as when each channel's rounding error is made good, as far as it can be, in those that follow.

    An error e of a row costs e hessian e^T. The channels with the largest cost of a step come first; with the Cholesky factor
    R^T R of the inverse Hessian, an error d of channel j is answered by -d R[j, k] / R[j, j] in every later channel k (GPTQ,
    Frantar et al. 2022, arXiv 2210.17323). The codes, scales and the decoder are those of plain rounding.

    Parameters
    ----------
    rows, scales, zeros : (layers, windows, KV heads, tokens, head_dim).
    hessian : (layers, 1, KV heads, head_dim, head_dim).
    """
    damped = _damped(hessian.double(), 1e-2)
    cost = damped.diagonal(dim1=-2, dim2=-1) * scales.square().mean((1, 3), keepdim=True)[..., 0, :].double()
    order = cost.argsort(-1, descending=True)
    damped = damped.gather(-1, order[..., None, :].expand(damped.shape)).gather(-2, order[..., None].expand(damped.shape))
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()
    places = order[..., None, :].expand(rows.shape)
    rest, steps, lows = (tensor.gather(-1, places) for tensor in (rows, scales, zeros))
    chosen = torch.empty_like(rest)
    for j in range(rows.shape[-1]):
        chosen[..., j] = nearest(rest[..., j], steps[..., j], lows[..., j], bits)
        error = (rest[..., j] - chosen[..., j]) / factor[..., j, j][..., None]
        rest[..., j + 1 :] -= error[..., None] * factor[..., j, j + 1 :][..., None, :]
    return torch.empty_like(chosen).scatter_(-1, places, chosen)


def quantized(variant: Variant, rows: Tensor, statistics: Statistics) -> Tensor:
    """Return what rows, (layers, windows, KV heads, tokens, head_dim), are read as; a last page may be incomplete."""
    tokens, hessian, inverse = rows.shape[-2], statistics.hessian, None
    if variant.transform != "none":
        matrix = transform_matrix(variant.transform, statistics)
        inverse = torch.linalg.inv(matrix).float()
        rows, hessian = rows @ matrix.float(), inverse @ hessian @ inverse.mT
    if variant.page:
        last = rows[..., -1:, :].expand(*rows.shape[:-2], -tokens % variant.page, rows.shape[-1])
        pages = torch.cat([rows, last], -2).unflatten(-2, (-1, variant.page))
        scales, zeros = (each.expand(pages.shape).flatten(-3, -2)[..., :tokens, :] for each in parameters(pages, variant))
    else:
        scales, zeros = (each[..., 0].expand(rows.shape) for each in parameters(rows[..., None], variant))
    if variant.hessian:
        read = rounded_in_turn(rows, scales, zeros, variant.bits, hessian)
    else:
        read = nearest(rows, scales, zeros, variant.bits)
    return read if inverse is None else read @ inverse
