"""The quantizers, bit for bit: every backend must produce these codes and scales.

Scales are rounded to 16 bits before the codes are chosen, and always outward, so that every finite input lies within the range
of the codes, up to half a unit in the last place of float32, in which the range is computed. Keys in a format with scales of
channels are finite up to 65504, and so are values in 4 bits or fewer whose group spans what float32 can hold. A NaN does not
count for the range that a page shares.

`CODECS` has the quantizer of every format with scales. A new format adds a line there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elastickv.kvcache.gptq import gptq_codes
from elastickv.kvcache.rounding import from_bf16_bits
from elastickv.recipe.formats import FORMATS, PAGE_TOKENS, Format, ScaleLayout

INT8_LEVELS = int(FORMATS["int8"].largest_code)
INT4_LEVELS = int(FORMATS["int4"].largest_code)
INT3_LEVELS = int(FORMATS["int3"].largest_code)
INT2_LEVELS = int(FORMATS["int2"].largest_code)
INT8_PER_CHANNEL_LEVELS = int(FORMATS["int8_per_channel"].largest_code)
FP8_MAX = float(FORMATS["fp8"].largest_code)

Planes = tuple[NDArray[Any], ...]
"""Codes, then scales, then zeros where the format has them."""
HeadCompensation = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Order and shares of one KV head, as `gptq.Compensation` has them."""


@dataclass(frozen=True)
class Codec:
    """How rows become codes and codes become numbers again.

    Attributes
    ----------
    quantize_keys : (pages, 32, head_dim) float32 -> `Planes`; (tokens, head_dim) where K is stored row by row.
    dequantize_keys : codes, scales and zeros -> float64 numbers of the codes' shape.
    quantize_values : the same of V, with the channels that share a scale as its second argument.
    dequantize_values : codes, scales and zeros -> float64 numbers.
    """

    quantize_keys: Callable[[NDArray[np.float32]], Planes]
    dequantize_keys: Callable[..., NDArray[np.float64]]
    quantize_values: Callable[[NDArray[np.float32], int], Planes]
    dequantize_values: Callable[..., NDArray[np.float64]]

    @classmethod
    def of_both(
        cls, quantize: Callable[[NDArray[np.float32]], Planes], dequantize: Callable[..., NDArray[np.float64]]
    ) -> "Codec":
        """Return the codec of a format that stores K and V alike."""
        return cls(quantize, dequantize, lambda rows, group: quantize(rows), dequantize)

    @classmethod
    def of_keys(
        cls, quantize: Callable[[NDArray[np.float32]], Planes], dequantize: Callable[..., NDArray[np.float64]]
    ) -> "Codec":
        """Return the codec of a format that stores keys only: a recipe cannot name it for values."""

        def no_values(*planes: Any) -> Any:
            raise ValueError("the format stores keys only")

        return cls(quantize, dequantize, no_values, no_values)


def quantize_int8(rows: ArrayLike) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
    """Quantize each row symmetrically to 8 bits with one bfloat16 scale.

    The scale is max|row| / 127 in float32, rounded *up* to bfloat16: no code needs clamping, and a row of zeros has scale 0.

    Parameters
    ----------
    rows : (..., head_dim) float32.

    Returns
    -------
    codes : (..., head_dim) int8, round-half-even of row / scale.
    scales : (...) uint16, bfloat16 bits.
    """
    x = np.asarray(rows, dtype=np.float32)
    step = np.abs(x).max(axis=-1) / np.float32(INT8_LEVELS)
    scales = ((step.view(np.uint32) + 0xFFFF) >> 16).astype(np.uint16)
    divisor = from_bf16_bits(scales)[..., None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(divisor > 0, np.rint(x / divisor), 0).astype(np.int8), scales


def dequantize_int8(codes: ArrayLike, scales: ArrayLike) -> NDArray[np.float64]:
    """Return codes x scales as float64; shapes as `quantize_int8` returns them."""
    return np.asarray(codes, np.float64) * from_bf16_bits(scales)[..., None]


def quantize_int4_keys(pages: ArrayLike) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """Quantize each channel of a page to 4 bits with a float16 scale and zero.

    The zero is the least value rounded down, the scale (greatest - zero) / 15 rounded up.

    Parameters
    ----------
    pages : (..., 32, head_dim) float32, of a magnitude up to 65504.

    Returns
    -------
    codes : (..., 32, head_dim) uint8, 0 to 15: round-half-even of (x - zero) / scale.
    scales, zeros : (..., head_dim); x is about scale * code + zero.
    """
    return _channels(pages, INT4_LEVELS)


def quantize_int8_keys_per_channel(pages: ArrayLike) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """Quantize each channel of a page to 8 bits with a float16 scale and zero, as `quantize_int4_keys` does.

    A channel's bias is in its zero, which is exact for 16-bit keys of a magnitude of 2^-14 or more: the error of a key depends
    on the range of its own channel in the page alone. After KIVI (Liu et al. 2024), which stores keys so in 2 and 4 bits.

    Parameters
    ----------
    pages : (..., 32, head_dim) float32, of a magnitude up to 65504.

    Returns
    -------
    codes : (..., 32, head_dim) uint8, 0 to 255: round-half-even of (x - zero) / scale.
    scales, zeros : (..., head_dim); x is about scale * code + zero.
    """
    return _channels(pages, INT8_PER_CHANNEL_LEVELS)


def dequantize_channels(codes: ArrayLike, scales: ArrayLike, zeros: ArrayLike) -> NDArray[np.float64]:
    """Return codes x scales + zeros as float64; shapes as quantizers of keys with scales of channels return them."""
    wide, base = (np.asarray(plane, np.float16).astype(np.float64)[..., None, :] for plane in (scales, zeros))
    return np.asarray(np.asarray(codes) * wide + base, np.float64)


def quantize_int4_values(rows: ArrayLike, group: int) -> tuple[NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint16]]:
    """Quantize each `group` of channels of a row to 4 bits with a bfloat16 scale and zero, rounded as those of keys.

    Parameters
    ----------
    rows : (..., head_dim) float32.

    Returns
    -------
    codes : (..., head_dim) uint8, 0 to 15.
    scales, zeros : (..., head_dim / group) uint16, bfloat16 bits.
    """
    return _groups(rows, group, INT4_LEVELS)


def quantize_int2_keys(pages: ArrayLike) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """Quantize each channel of a page to 2 bits, as `quantize_int4_keys` does to 4: codes are 0 to 3."""
    return _channels(pages, INT2_LEVELS)


def quantize_int2_values(rows: ArrayLike, group: int) -> tuple[NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint16]]:
    """Quantize each `group` of channels of a row to 2 bits, as `quantize_int4_values` does to 4: codes are 0 to 3."""
    return _groups(rows, group, INT2_LEVELS)


def quantize_int3_keys(pages: ArrayLike) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """Quantize each channel of a page to 3 bits, as `quantize_int4_keys` does to 4: codes are 0 to 7."""
    return _channels(pages, INT3_LEVELS)


def quantize_int3_values(rows: ArrayLike, group: int) -> tuple[NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint16]]:
    """Quantize each `group` of channels of a row to 3 bits, as `quantize_int4_values` does to 4: codes are 0 to 7."""
    return _groups(rows, group, INT3_LEVELS)


def dequantize_groups(codes: ArrayLike, scales: ArrayLike, zeros: ArrayLike) -> NDArray[np.float64]:
    """Return codes x scales + zeros as float64; shapes as quantizers of values with scales of groups return them."""
    rows, bits = np.asarray(codes), np.asarray(scales)
    grouped = rows.reshape(*bits.shape, rows.shape[-1] // bits.shape[-1])
    values = grouped * from_bf16_bits(bits).astype(np.float64)[..., None] + from_bf16_bits(zeros)[..., None]
    return np.asarray(values, np.float64).reshape(rows.shape)


def quantize_fp8(pages: ArrayLike) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Round each page to float8 e4m3 with one power of two as its scale: the least with which no element exceeds 448.

    Parameters
    ----------
    pages : (..., 32, head_dim) float32.

    Returns
    -------
    codes : (..., 32, head_dim) uint8, bits of OCP float8 e4m3 (round half to even, no infinity).
    scales : (...) uint16, bfloat16 bits; 0 for a page of zeros.
    """
    x = np.asarray(pages, dtype=np.float32)
    step = np.fmax.reduce(np.abs(x), axis=(-2, -1)) / np.float32(FP8_MAX)
    power = (step.view(np.uint32) + 0x7FFFFF) & 0x7F800000
    divisor = power.view(np.float32)[..., None, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = np.where(divisor > 0, x / divisor, 0).astype(np.float32)
    return _to_e4m3(scaled), (power >> 16).astype(np.uint16)


def dequantize_fp8(codes: ArrayLike, scales: ArrayLike) -> NDArray[np.float64]:
    """Return the float64 values of codes and scales as `quantize_fp8` returns them."""
    return E4M3_VALUES[np.asarray(codes, np.uint8)] * from_bf16_bits(scales)[..., None, None]


CODECS: dict[str, Codec] = {
    "int8": Codec.of_both(quantize_int8, dequantize_int8),
    "fp8": Codec.of_both(quantize_fp8, dequantize_fp8),
    "int4": Codec(quantize_int4_keys, dequantize_channels, quantize_int4_values, dequantize_groups),
    "int8_per_channel": Codec.of_keys(quantize_int8_keys_per_channel, dequantize_channels),
    "int3": Codec(quantize_int3_keys, dequantize_channels, quantize_int3_values, dequantize_groups),
    "int2": Codec(quantize_int2_keys, dequantize_channels, quantize_int2_values, dequantize_groups),
}


@np.errstate(invalid="ignore", over="ignore")
def stored_values(
    rows: ArrayLike, fmt: str, value: bool, group: int, compensation: HeadCompensation | None = None
) -> NDArray[np.float64]:
    """Return the numbers that `rows`, already rounded to the 16-bit dtype of the window, become once stored in a format.

    Numbers that are not finite, or too large to be stored, come back as NaN or infinity without a warning: the caches report
    them.

    Parameters
    ----------
    rows : (tokens, head_dim); whole pages where the format has scales of pages.
    value : whether these are values; else keys.
    group : channels of V that share a scale.
    compensation : by which the codes are chosen; None: the nearest ones.
    """
    x = np.asarray(rows, np.float32)
    stored = FORMATS[fmt]
    if stored.is_float:
        return x.astype(np.float64)
    codec = CODECS[fmt]
    layout = stored.values if value else stored.keys
    by_row = layout is not None and layout.by_row
    pages = x if by_row else x.reshape(len(x) // PAGE_TOKENS, PAGE_TOKENS, x.shape[-1])
    planes = codec.quantize_values(pages, group) if value else codec.quantize_keys(pages)
    if compensation is not None:
        chosen = _gptq_codes(pages, planes, stored, layout, compensation)
        planes = (chosen.astype(planes[0].dtype), *planes[1:])
    return (codec.dequantize_values if value else codec.dequantize_keys)(*planes).reshape(x.shape)


def _gptq_codes(
    pages: NDArray[np.float32], planes: Planes, stored: Format, layout: ScaleLayout | None, compensation: HeadCompensation
) -> NDArray[np.float32]:
    """Return codes of rows with the scales and zeros of `planes`."""

    def wide(plane: NDArray[Any]) -> NDArray[np.float32]:
        if layout is ScaleLayout.CHANNEL:
            return np.asarray(plane, np.float32)[..., None, :]
        numbers = from_bf16_bits(plane)
        if layout is ScaleLayout.GROUP:
            return np.asarray(np.repeat(numbers, pages.shape[-1] // plane.shape[-1], axis=-1))
        return numbers[..., None]

    scales = wide(planes[1])
    zeros = wide(planes[2]) if len(planes) > 2 else np.zeros(1, np.float32)
    low = -stored.largest_code if stored.signed else 0.0
    return gptq_codes(pages, scales, zeros, low, stored.largest_code, *compensation)


def _channels(pages: ArrayLike, levels: int) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    x = np.asarray(pages, dtype=np.float32)
    zeros = _float16_towards(np.fmin.reduce(x, axis=-2), -np.inf)
    wide = zeros.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        scales = _float16_towards((np.fmax.reduce(x, axis=-2) - wide) / np.float32(levels), np.inf)
    return _affine_codes(x, scales.astype(np.float32)[..., None, :], wide[..., None, :], levels), scales, zeros


def _groups(rows: ArrayLike, group: int, levels: int) -> tuple[NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint16]]:
    x = np.asarray(rows, dtype=np.float32)
    grouped = x.reshape(*x.shape[:-1], x.shape[-1] // group, group)
    zeros = _bf16_bits_towards(grouped.min(axis=-1), -np.inf)
    wide = from_bf16_bits(zeros)
    with np.errstate(invalid="ignore", over="ignore"):
        scales = _bf16_bits_towards((grouped.max(axis=-1) - wide) / np.float32(levels), np.inf)
    codes = _affine_codes(grouped, from_bf16_bits(scales)[..., None], wide[..., None], levels)
    return codes.reshape(x.shape), scales, zeros


def _affine_codes(
    x: NDArray[np.float32], scales: NDArray[np.float32], zeros: NDArray[np.float32], levels: int
) -> NDArray[np.uint8]:
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        codes = np.clip(np.rint((x - zeros) / scales), 0, levels)
        return np.where(scales > 0, np.nan_to_num(codes), 0).astype(np.uint8)


def _float16_towards(x: NDArray[np.float32], direction: float) -> NDArray[np.float16]:
    """Round float32 to float16 towards -inf or +inf."""
    with np.errstate(over="ignore", invalid="ignore"):
        near = x.astype(np.float16)
        wrong = near.astype(np.float32) > x if direction < 0 else near.astype(np.float32) < x
        return np.where(wrong, np.nextafter(near, np.float16(direction)), near)


def _bf16_bits_towards(x: NDArray[np.float32], direction: float) -> NDArray[np.uint16]:
    """Round float32 to bfloat16 towards -inf or +inf; return the bits."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    away = np.signbit(x) == (direction < 0)
    return np.asarray((bits + np.where(away, np.uint32(0xFFFF), np.uint32(0))) >> 16, np.uint16)


def _e4m3_values() -> NDArray[np.float64]:
    """Return the numbers that the 256 codes of OCP float8 e4m3 stand for (OCP OFP8 specification, 2023)."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    magnitude = np.where(exponent, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6)
    return np.where(codes & 0x7F == 0x7F, np.nan, np.where(codes & 0x80, -magnitude, magnitude))


E4M3_VALUES = _e4m3_values()
_E4M3_POSITIVE = E4M3_VALUES[:127]


def _to_e4m3(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    magnitude = np.minimum(np.abs(x.astype(np.float64)), FP8_MAX)
    above = np.searchsorted(_E4M3_POSITIVE, magnitude).clip(1, 126)
    below = above - 1
    middle = (_E4M3_POSITIVE[above] + _E4M3_POSITIVE[below]) / 2
    up = (magnitude > middle) | ((magnitude == middle) & (above % 2 == 0))
    codes = np.where(up, above, below).astype(np.uint8)
    codes = np.where(np.isnan(x), np.uint8(0x7F), codes)
    return np.where(np.signbit(x), codes | np.uint8(0x80), codes)
