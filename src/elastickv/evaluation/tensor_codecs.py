"""Our formats in PyTorch: what tokens become once stored, the numbers of `kvcache.quantize`, where no codes are needed.

A calibration reads them at every layer. Tokens stay on their device, and all heads of a layer are quantized at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch

from elastickv.kvcache.quantize import (
    FP8_MAX,
    INT3_LEVELS,
    INT4_LEVELS,
    INT8_LEVELS,
    INT8_PER_CHANNEL_LEVELS,
    stored_values,
)
from elastickv.recipe.formats import PAGE_TOKENS

Tensor: TypeAlias = Any
_UPPER_BITS, _LOWER_BITS = -0x10000, 0xFFFF  # of a float32: those of a bfloat16, and those that it lacks
_MANTISSA, _EXPONENT = 0x7FFFFF, 0x7F800000


def stored_rows(rows: Tensor, fmt: str, value: bool, group: int) -> Tensor:
    """Return what finite rows become once stored in a format, as `kvcache.quantize.stored_values` does.

    Parameters
    ----------
    rows : (..., tokens, head_dim) float32; whole pages of tokens.
    value : whether these are values; else keys.
    group : channels of V that share a scale.
    """
    if (fmt, value) not in _CODECS:
        flat = rows.flatten(0, -3) if rows.dim() > 2 else rows[None]
        stored = [torch.from_numpy(stored_values(each.cpu().numpy(), fmt, value, group)).to(rows) for each in flat]
        return torch.stack(stored).view(rows.shape)
    return _CODECS[fmt, value](rows, group)


def channel_scales(pages: Tensor, levels: int = INT4_LEVELS) -> tuple[Tensor, Tensor]:
    """Return (..., head_dim) scales and zeros of (..., 32, head_dim) keys whose channels have one of each, all float32."""
    zeros = _float16_towards(pages.amin(-2), up=False)
    return _float16_towards((pages.amax(-2) - zeros) / levels, up=True), zeros


def _int8(rows: Tensor, _: int) -> Tensor:
    step = rows.abs().amax(-1, keepdim=True) / INT8_LEVELS
    scales = _bfloat16_towards(step, up=True)
    return torch.where(scales > 0, (rows / scales).round() * scales, 0)


def _by_channel(rows: Tensor, _: int, levels: int) -> Tensor:
    pages = rows.unflatten(-2, (-1, PAGE_TOKENS))
    scales, zeros = (plane[..., None, :] for plane in channel_scales(pages, levels))
    return _affine(pages, scales, zeros, levels).flatten(-3, -2)


def _by_group(rows: Tensor, group: int, levels: int) -> Tensor:
    grouped = rows.unflatten(-1, (-1, group))
    zeros = _bfloat16_towards(grouped.amin(-1, keepdim=True), up=False)
    scales = _bfloat16_towards((grouped.amax(-1, keepdim=True) - zeros) / levels, up=True)
    return _affine(grouped, scales, zeros, levels).flatten(-2)


def _fp8(rows: Tensor, _: int) -> Tensor:
    pages = rows.unflatten(-2, (-1, PAGE_TOKENS))
    step = pages.abs().amax((-2, -1), keepdim=True) / FP8_MAX
    scales = ((step.view(torch.int32) + _MANTISSA) & _EXPONENT).view(torch.float32)
    codes = (pages / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return torch.where(scales > 0, codes.float() * scales, 0).flatten(-3, -2)


def _affine(x: Tensor, scales: Tensor, zeros: Tensor, levels: int) -> Tensor:
    """Return the numbers of codes that are rounded half to even; all products and sums are exact before the last rounding."""
    codes = ((x - zeros) / scales).round().clamp(0, levels)
    return (torch.where(scales > 0, codes, 0).double() * scales + zeros).float()


def _bfloat16_towards(x: Tensor, up: bool) -> Tensor:
    """Round float32 to bfloat16 upwards or downwards."""
    away = (torch.signbit(x) != up).to(torch.int32)
    return ((x.view(torch.int32) + _LOWER_BITS * away) & _UPPER_BITS).view(torch.float32)


def _float16_towards(x: Tensor, up: bool) -> Tensor:
    """Round float32 to float16 upwards or downwards."""
    near = x.half()
    wrong = near.float() < x if up else near.float() > x
    next_one = near.view(torch.int16) + torch.where(torch.signbit(near) != up, 1, -1).to(torch.int16)
    return torch.where(wrong, next_one.view(torch.float16), near).float()


_CODECS: dict[tuple[str, bool], Callable[[Tensor, int], Tensor]] = {
    ("int8", False): _int8,
    ("int8", True): _int8,
    ("int8_per_channel", False): partial(_by_channel, levels=INT8_PER_CHANNEL_LEVELS),
    ("fp8", False): _fp8,
    ("fp8", True): _fp8,
    ("int4", False): partial(_by_channel, levels=INT4_LEVELS),
    ("int4", True): partial(_by_group, levels=INT4_LEVELS),
    ("int3", True): partial(_by_group, levels=INT3_LEVELS),
}
