"""The quantisers, bit for bit: every back end must produce these codes and scales."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elastickv.cache.bits import from_bf16_bits

INT8_LEVELS = 127


def quantise_int8(rows: ArrayLike) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
    """Quantise each row symmetrically to 8 bits with one bfloat16 scale.

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
        codes = np.rint(x / divisor)
    return np.where(divisor > 0, codes, 0).astype(np.int8), scales


def dequantise_int8(codes: ArrayLike, scales: ArrayLike) -> NDArray[np.float64]:
    """Return codes x scales as float64; shapes as `quantise_int8` returns them."""
    return np.asarray(codes, np.float64) * from_bf16_bits(scales).astype(np.float64)[..., None]


def stored_values(rows: ArrayLike, cold_format: str) -> NDArray[np.float64]:
    """Return what `rows`, already rounded to the 16-bit dtype of the window, read as once stored in `cold_format`."""
    if cold_format == "int8":
        return dequantise_int8(*quantise_int8(rows))
    return np.asarray(rows, np.float64)
