"""Our formats in PyTorch: what tokens become once stored, the numbers of `kvcache.quantize`, where no codes are needed.

A calibration reads them at every layer. Tokens stay on their device, and all heads of a layer are quantized at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch

from elastickv.kvcache.gptq import Compensation, transformed
from elastickv.kvcache.quantize import (
    FP8_MAX,
    INT2_LEVELS,
    INT3_LEVELS,
    INT4_LEVELS,
    INT8_LEVELS,
    INT8_PER_CHANNEL_LEVELS,
    stored_values,
)
from elastickv.recipe.calibration import Smoothing
from elastickv.recipe.formats import PAGE_TOKENS

Tensor: TypeAlias = Any
_Grid: TypeAlias = tuple[Tensor, Tensor, float, float]  # scales and zeros that broadcast to the rows; the range of codes
_UPPER_BITS, _LOWER_BITS = -0x10000, 0xFFFF  # of a float32: those of a bfloat16, and those that it lacks
_MANTISSA, _EXPONENT = 0x7FFFFF, 0x7F800000


@dataclass(frozen=True)
class TensorCompensation:
    """A `kvcache.gptq.Compensation` on a device.

    Attributes
    ----------
    order : (kv_heads, head_dim) int64.
    shares : (kv_heads, head_dim, head_dim) float32.
    """

    order: Tensor
    shares: Tensor

    @classmethod
    def of(cls, hessians: Tensor, is_rotated: bool, smoothing: Smoothing | None = None) -> "TensorCompensation":
        """Return that of (kv_heads, head_dim, head_dim) Hessians of the model's own keys or values, on their device.

        Parameters
        ----------
        is_rotated, smoothing : how the tensor is stored, as in `kvcache.gptq.transformed`.
        """
        chosen = Compensation.of(transformed(hessians.double().cpu().numpy(), is_rotated, smoothing))
        return cls.at(chosen, hessians.device)

    @classmethod
    def at(cls, chosen: Compensation, device: Any) -> "TensorCompensation":
        """Return a copy of a compensation on a device."""
        return cls(torch.from_numpy(chosen.order), torch.from_numpy(chosen.shares)).to(device)

    def to(self, device: Any) -> "TensorCompensation":
        """Return it on a device."""
        return TensorCompensation(self.order.to(device), self.shares.to(device))


def stored_rows(rows: Tensor, fmt: str, value: bool, group: int, compensation: TensorCompensation | None = None) -> Tensor:
    """Return what finite rows become once stored in a format, as `kvcache.quantize.stored_values` does.

    Parameters
    ----------
    rows : (..., tokens, head_dim) float32; whole pages of tokens. (..., kv_heads, tokens, head_dim) with `compensation`.
    value : whether these are values; else keys.
    group : channels of V that share a scale.
    compensation : by which codes are chosen, in an integer format; None: the nearest ones.
    """
    if (fmt, value) in _GRIDS:
        scales, zeros, low, high = _GRIDS[fmt, value](rows, group)
        if compensation is not None:
            codes = _gptq_codes(rows, scales, zeros, low, high, compensation)
        else:
            codes = torch.where(scales > 0, ((rows - zeros) / scales).round().clamp(low, high), 0)
        return (codes.double() * scales + zeros).float()
    if fmt in _FLOATS:
        return _FLOATS[fmt](rows)
    flat = rows.flatten(0, -3) if rows.dim() > 2 else rows[None]
    stored = [torch.from_numpy(stored_values(each.cpu().numpy(), fmt, value, group)).to(rows) for each in flat]
    return torch.stack(stored).view(rows.shape)


def channel_scales(pages: Tensor, levels: int = INT4_LEVELS) -> tuple[Tensor, Tensor]:
    """Return (..., head_dim) scales and zeros of (..., 32, head_dim) keys whose channels have one of each, all float32."""
    zeros = _float16_towards(pages.amin(-2), up=False)
    return _float16_towards((pages.amax(-2) - zeros) / levels, up=True), zeros


def _gptq_codes(
    rows: Tensor, scales: Tensor, zeros: Tensor, low: float, high: float, compensation: TensorCompensation
) -> Tensor:
    """Return the codes of rows, chosen as `kvcache.gptq.gptq_codes` does: the same in float32, operation by operation."""
    heads, head_dim = compensation.order.shape
    # (head_dim, ..., kv_heads, tokens): channels in the order of their head.
    positions = compensation.order[:, None].expand(rows.shape)
    rest, steps = ((rows - zeros).gather(-1, positions), scales.expand(rows.shape).gather(-1, positions))
    rest, steps = (each.movedim(-1, 0).contiguous() for each in (rest, steps))
    shares = compensation.shares.permute(1, 2, 0).reshape(head_dim, head_dim, *(1,) * (rows.dim() - 3), heads, 1)
    codes = torch.empty_like(rest)
    for j in range(head_dim):
        whole = (rest[j] / steps[j]).clamp(low, high).round()
        codes[j] = torch.where(steps[j] > 0, whole, 0)
        error = rest[j] - codes[j] * steps[j]
        rest[j + 1 :] -= error * shares[j + 1 :, j]
    return torch.empty_like(rows).scatter_(-1, positions, codes.movedim(0, -1))


def _int8_grid(rows: Tensor, _: int) -> _Grid:
    scales = _bfloat16_towards(rows.abs().amax(-1, keepdim=True) / INT8_LEVELS, up=True)
    return scales, torch.zeros_like(scales), -INT8_LEVELS, INT8_LEVELS


def _channel_grid(rows: Tensor, _: int, levels: int) -> _Grid:
    """Return the grid of keys, a page's scales and zeros repeated for all of its tokens."""
    planes = channel_scales(rows.unflatten(-2, (-1, PAGE_TOKENS)), levels)
    scales, zeros = (plane.repeat_interleave(PAGE_TOKENS, -2) for plane in planes)
    return scales, zeros, 0, levels


def _group_grid(rows: Tensor, group: int, levels: int) -> _Grid:
    grouped = rows.unflatten(-1, (-1, group))
    zeros = _bfloat16_towards(grouped.amin(-1), up=False)
    scales = _bfloat16_towards((grouped.amax(-1) - zeros) / levels, up=True)
    return scales.repeat_interleave(group, -1), zeros.repeat_interleave(group, -1), 0, levels


def _fp8(rows: Tensor) -> Tensor:
    pages = rows.unflatten(-2, (-1, PAGE_TOKENS))
    step = pages.abs().amax((-2, -1), keepdim=True) / FP8_MAX
    scales = ((step.view(torch.int32) + _MANTISSA) & _EXPONENT).view(torch.float32)
    codes = (pages / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return torch.where(scales > 0, codes.float() * scales, 0).flatten(-3, -2)


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


_GRIDS: dict[tuple[str, bool], Callable[[Tensor, int], _Grid]] = {
    ("int8", False): _int8_grid,
    ("int8", True): _int8_grid,
    ("int8_per_channel", False): partial(_channel_grid, levels=INT8_PER_CHANNEL_LEVELS),
    ("int4", False): partial(_channel_grid, levels=INT4_LEVELS),
    ("int4", True): partial(_group_grid, levels=INT4_LEVELS),
    ("int2", False): partial(_channel_grid, levels=INT2_LEVELS),
    ("int2", True): partial(_group_grid, levels=INT2_LEVELS),
    ("int3", False): partial(_channel_grid, levels=INT3_LEVELS),
    ("int3", True): partial(_group_grid, levels=INT3_LEVELS),
}
_FLOATS: dict[str, Callable[[Tensor], Tensor]] = {"fp8": _fp8}
