"""16-bit floats in NumPy, which has no bfloat16: values in float32, bfloat16 bits in uint16."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def to_bf16_bits(values: ArrayLike) -> NDArray[np.uint16]:
    """Round float32 values to bfloat16 (nearest, ties to even) and return their bits; NaN stays NaN."""
    x = np.ascontiguousarray(values, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def from_bf16_bits(bits: ArrayLike) -> NDArray[np.float32]:
    """Return the float32 values of bfloat16 bits."""
    return (np.asarray(bits, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


LARGEST = {"fp32": float(np.finfo(np.float32).max), "fp16": 65504.0, "bf16": float(np.uint32(0x7F7F0000).view(np.float32))}


def limited(values: ArrayLike, dtype: str) -> NDArray[np.float32]:
    """Return float32 `values` rounded to `dtype`; finite ones beyond its largest become that."""
    x = np.asarray(values, np.float32)
    most = np.float32(LARGEST[dtype])
    return rounded(np.where(np.isfinite(x), np.clip(x, -most, most), x), dtype)


def rounded(values: ArrayLike, dtype: str) -> NDArray[np.float32]:
    """Return float32 `values` rounded to `dtype` ('fp32', 'fp16' or 'bf16'), as float32."""
    x = np.asarray(values, dtype=np.float32)
    if dtype == "fp32":
        return x
    if dtype == "bf16":
        return from_bf16_bits(to_bf16_bits(x))
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)
