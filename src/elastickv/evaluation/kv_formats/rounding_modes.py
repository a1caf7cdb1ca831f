"""Rounding to integers and to small floats, as the published formats do it. All numbers are float32 tensors."""

from dataclasses import dataclass

import torch

from elastickv.evaluation.prefill import Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0
TINY = 1e-30  # a divisor where a group spans nothing: all of its codes are 0


def half_away(x: Tensor) -> Tensor:
    """Round to the nearest integer, halves away from zero: C's `roundf`."""
    return x.sign() * (x.abs() + 0.5).floor()


def to_e4m3(x: Tensor) -> Tensor:
    """Round to float8 e4m3 (OCP 8-bit floating point, no infinity), saturating at 448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def to_e2m1(x: Tensor) -> Tensor:
    """Round to float4 e2m1 (OCP Microscaling 1.0, 5.3.3): 0, 0.5, 1, 1.5, 2, 3, 4, 6; halves to even, saturating at 6."""
    size = x.abs().clamp_max(E2M1_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return x.sign() * (size / step).round() * step


def to_half(x: Tensor) -> Tensor:
    """Round to float16, as scales and zeros are stored."""
    return x.half().to(x.dtype)


@dataclass(frozen=True)
class UniformCodes:
    """Codes 0 to 2^bits - 1 of groups along one dimension: x is about code * scale + zero."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def uniform_codes(x: Tensor, bits: int, dim: int) -> UniformCodes:
    """Quantize groups, each the whole of a dimension, from their least to their greatest number.

    zero = min, scale = (max - min) / (2^bits - 1), code = round-half-even((x - zero) / scale): KIVI's and KVarN's quantizer.
    """
    zero = x.amin(dim, keepdim=True)
    scale = (x.amax(dim, keepdim=True) - zero) / (2**bits - 1)
    codes = ((x - zero) / scale.clamp_min(TINY)).round().clamp(0, 2**bits - 1)
    return UniformCodes(codes, scale, zero)
