"""Reading pages back as rows, for tests and the float64 reference. The twin of `storage`, in NumPy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickv.backends.cpu.intrinsics import COLUMNS
from elastickv.backends.cpu.layout import page_bytes, plane_bytes, scale_bytes
from elastickv.kvcache.attention import Float64
from elastickv.kvcache.quantize import CODECS
from elastickv.kvcache.rounding import from_bf16_bits
from elastickv.recipe import FORMATS, PAGE_TOKENS
from elastickv.recipe.formats import ScaleLayout

Bytes = NDArray[np.uint8]
Numbers = NDArray[Any]


@np.errstate(invalid="ignore", over="ignore")  # values that are not finite stay so: the cache reports them
def unpack_rows(
    raw: Bytes, bounds: Bytes, formats: tuple[str, str], head_dim: int, group: int, rows: NDArray[np.int64]
) -> tuple[Float64, Float64]:
    """Return (rows, head_dim) keys and values, dequantized, of tokens `rows` in the pages of a KV head.

    Parameters
    ----------
    raw : its pages.
    bounds : its scales and zeros of int4 keys.
    formats : of K and V.
    group : channels of V that share an int4 scale.
    """
    if not len(rows):
        return np.zeros((0, head_dim)), np.zeros((0, head_dim))
    used, inverse = np.unique(rows // PAGE_TOKENS, return_inverse=True)
    pages = raw.reshape(-1, page_bytes(*formats, head_dim, group))[used]
    key, value = formats
    sizes = (plane_bytes(key, head_dim), plane_bytes(value, head_dim), scale_bytes(key, head_dim, group, False))
    parts = np.split(pages, np.cumsum(sizes), axis=1)
    keys = _keys(parts[0], key, head_dim)
    values = _values(parts[1], value, head_dim, group)
    plane = bounds[: len(bounds) // (4 * head_dim) * 4 * head_dim].view(np.float16).reshape(-1, 2, head_dim)
    if FORMATS[key].keys is ScaleLayout.CHANNEL:
        read_keys = CODECS[key].dequantize_keys(keys, *plane[used].transpose(1, 0, 2))
    else:
        read_keys = _numbers(keys, parts[2], key, False, group)
    read_values = _numbers(values, parts[3], value, True, group)
    tokens = rows % PAGE_TOKENS
    return read_keys[inverse, tokens], read_values[inverse, tokens]


def _numbers(codes: Numbers, scales: Bytes, fmt: str, value: bool, group: int) -> Float64:
    """Return the numbers of codes of V, or of K, whose scales are stored in their page."""
    if FORMATS[fmt].is_float:
        return (from_bf16_bits(codes) if fmt == "bf16" else codes).astype(np.float64)
    dequantize = CODECS[fmt].dequantize_values if value else CODECS[fmt].dequantize_keys
    layout = FORMATS[fmt].values if value else FORMATS[fmt].keys
    bits = np.ascontiguousarray(scales).view(np.uint16)
    if layout is ScaleLayout.GROUP:
        groups = codes.shape[2] // group
        planes = bits[:, : 2 * PAGE_TOKENS * groups].reshape(-1, groups, 2, PAGE_TOKENS)
        return dequantize(codes, *planes.transpose(2, 0, 3, 1))
    return dequantize(codes, bits[:, :PAGE_TOKENS] if layout is ScaleLayout.TOKEN else bits[:, 0])


def _elements(plane: Bytes, fmt: str) -> Numbers:
    kinds = {"fp32": np.float32, "fp16": np.float16}
    kind = kinds.get(fmt) or (np.int8 if FORMATS[fmt].signed else np.uint8 if FORMATS[fmt].bits == 8 else np.uint16)
    return np.ascontiguousarray(plane).view(kind)


def _nibbles(words: Numbers) -> Numbers:
    """(..., 2) 16-bit words -> (..., 8) codes: number 2i + h is nibble i of word h."""
    shifts = 4 * np.arange(4, dtype=np.uint16)[:, None]
    return np.asarray(words[..., None, :] >> shifts & 15, np.uint8).reshape(*words.shape[:-1], 8)


def _keys(plane: Bytes, fmt: str, head_dim: int) -> Numbers:
    """(pages, bytes) -> (pages, 32 tokens, head_dim) elements as stored."""
    elements = _elements(plane, fmt)
    if FORMATS[fmt].bits == 4:
        codes = _nibbles(elements.reshape(-1, head_dim // 8, PAGE_TOKENS, 2))
        return codes.transpose(0, 2, 1, 3).reshape(-1, PAGE_TOKENS, head_dim)
    if FORMATS[fmt].signed:
        pairs = elements.reshape(-1, head_dim // 2, PAGE_TOKENS, 2)
        return pairs.transpose(0, 2, 1, 3).reshape(-1, PAGE_TOKENS, head_dim)
    return elements.reshape(-1, head_dim, PAGE_TOKENS).transpose(0, 2, 1)


def _values(plane: Bytes, fmt: str, head_dim: int, group: int) -> Numbers:
    """(pages, bytes) -> (pages, 32 tokens, head_dim) elements as stored."""
    chunks = []
    for start in range(0, head_dim, group):
        for column in range(start, start + group, COLUMNS):
            columns = min(COLUMNS, start + group - column)
            first, last = (plane_bytes(fmt, column), plane_bytes(fmt, column + columns))
            chunk = _elements(plane[:, first:last], fmt)
            if FORMATS[fmt].bits == 4:
                chunk = _nibbles(chunk.reshape(-1, PAGE_TOKENS // 8, columns, 2)).transpose(0, 1, 3, 2)
            if FORMATS[fmt].signed:
                chunk = chunk.reshape(-1, PAGE_TOKENS // 2, columns, 2).transpose(0, 1, 3, 2)
            chunks.append(chunk.reshape(-1, PAGE_TOKENS, columns))
    return np.concatenate(chunks, axis=2)
