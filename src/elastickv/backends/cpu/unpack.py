"""Reading pages back as rows, for tests and the float64 reference. The twin of `storage`, in NumPy."""

import numpy as np
from numpy.typing import NDArray

from elastickv.attention.reference import Float64
from elastickv.backends.cpu.intrinsics import COLUMNS
from elastickv.backends.cpu.layout import page_bytes
from elastickv.cache.bits import from_bf16_bits
from elastickv.cache.quantise import dequantise_int8
from elastickv.recipe import FORMATS, PAGE_TOKENS


def unpack_rows(raw: NDArray[np.uint8], fmt: str, head_dim: int, rows: NDArray[np.int64]) -> tuple[Float64, Float64]:
    """Return (rows, head_dim) keys and values, dequantised, of token slots `rows` of a KV head's pages `raw`."""
    if not len(rows):
        return np.zeros((0, head_dim)), np.zeros((0, head_dim))
    used, inverse = np.unique(rows // PAGE_TOKENS, return_inverse=True)
    pages = raw.reshape(-1, page_bytes(fmt, head_dim))[used]
    plane = PAGE_TOKENS * head_dim * FORMATS[fmt].bits // 8
    keys, values = _keys(pages[:, :plane], fmt, head_dim), _values(pages[:, plane : 2 * plane], fmt, head_dim)
    slots = rows % PAGE_TOKENS
    if fmt != "int8":
        return _floats(keys[inverse, slots], fmt), _floats(values[inverse, slots], fmt)
    scales = np.ascontiguousarray(pages[:, 2 * plane :]).view(np.uint16).reshape(-1, 2, PAGE_TOKENS)[inverse, :, slots]
    return dequantise_int8(keys[inverse, slots], scales[:, 0]), dequantise_int8(values[inverse, slots], scales[:, 1])


def _elements(plane: NDArray[np.uint8], fmt: str) -> NDArray[np.generic]:
    kinds = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16, "int8": np.int8}
    return np.ascontiguousarray(plane).view(kinds[fmt])


def _keys(plane: NDArray[np.uint8], fmt: str, head_dim: int) -> NDArray[np.generic]:
    """(pages, bytes) -> (pages, 32 tokens, head_dim) elements as stored."""
    elements = _elements(plane, fmt)
    if fmt == "int8":
        pairs = elements.reshape(-1, head_dim // 2, PAGE_TOKENS, 2)
        return pairs.transpose(0, 2, 1, 3).reshape(-1, PAGE_TOKENS, head_dim)
    return elements.reshape(-1, head_dim, PAGE_TOKENS).transpose(0, 2, 1)


def _values(plane: NDArray[np.uint8], fmt: str, head_dim: int) -> NDArray[np.generic]:
    """(pages, bytes) -> (pages, 32 tokens, head_dim) elements as stored."""
    elements = _elements(plane, fmt)
    chunks = []
    for column in range(0, head_dim, COLUMNS):
        columns = min(COLUMNS, head_dim - column)
        chunk = elements[:, PAGE_TOKENS * column : PAGE_TOKENS * (column + columns)]
        if fmt == "int8":
            chunk = chunk.reshape(-1, PAGE_TOKENS // 2, columns, 2).transpose(0, 1, 3, 2)
        chunks.append(chunk.reshape(-1, PAGE_TOKENS, columns))
    return np.concatenate(chunks, axis=2)


def _floats(elements: NDArray[np.generic], fmt: str) -> Float64:
    return (from_bf16_bits(elements) if fmt == "bf16" else elements).astype(np.float64)
