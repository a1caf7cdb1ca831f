"""The kernels' page layout (`pages.cuh`, `format_codecs.cuh`), decoded on the host: for tests, the oracle and `stored`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickv.kvcache.attention import Float64
from elastickv.kvcache.quantize import CODECS
from elastickv.kvcache.rounding import from_bf16_bits
from elastickv.recipe.formats import FORMATS, PAGE_TOKENS, Format, ScaleLayout, round_up

_VALUE_OFFSET = 128
Indices = NDArray[np.int64]


def _element_indices(rows: int, elements: int) -> tuple[Indices, ...]:
    """Return row, g, t, word and element of every element of a page, in memory order."""
    row, lane, word, element = (i.ravel() for i in np.indices((rows, 32, 4, elements)))
    return row, lane >> 2, lane & 3, word, element


def key_positions(fmt: str, head_dim: int) -> tuple[Indices, Indices]:
    """Return token and channel of each element of a page of K; channels from `head_dim` on are padding."""
    bits = FORMATS[fmt].bits
    row, g, t, w, e = _element_indices(round_up(head_dim, 32 if bits == 4 else 16) * bits // 128, 32 // bits)
    if bits == 4:
        return 8 * (e & 3) + g, 16 * (2 * row + (w >> 1)) + 4 * t + 2 * (w & 1) + (e >> 2)
    if bits == 16:
        return 8 * (2 * (row & 1) + (w >> 1)) + g, 16 * (row >> 1) + 4 * t + 2 * (w & 1) + e
    return 8 * w + g, 16 * row + 4 * t + e


def value_positions(fmt: str, head_dim: int, group: int) -> tuple[Indices, Indices]:
    """Return token and dim of each element of a page of V; dims from `head_dim` on are padding."""
    bits = FORMATS[fmt].bits
    row, g, t, w, e = _element_indices(round_up(head_dim, 32 if bits == 4 else 16) * bits // 128, 32 // bits)
    if bits == 16:
        return 8 * w + 2 * t + e, 16 * (row >> 1) + g + 8 * (row & 1)
    if bits == 8:
        return 8 * (2 * (w & 1) + (e >> 1)) + 2 * t + (e & 1), 16 * row + g + 8 * (w >> 1)
    position = 16 * (2 * row + (w >> 1)) + g + 8 * (e & 1)
    padded = round_up(group, 16)
    which, within = position // padded, position % padded
    dim = np.where((within < group) & (which < head_dim // group), which * group + within, head_dim)
    return 8 * (2 * (w & 1) + (e >> 1 & 1)) + 2 * t + (e >> 2), dim


def query_vectors(key: Format, head_dim: int, keys_as_rows: bool) -> int:
    """Return the 16-byte vectors of a lane with a tile of queries as operands: QUERY_VECTORS of format_codecs.cuh.

    Integers multiply 32 channels at once, others 16. With keys as rows, a vector serves two of these steps, and scales of
    channels need a second one.
    """
    tiles = key.key_row_bytes(head_dim) * 8 // key.bits // 16
    steps = -(-tiles // 2) if key.signed else tiles
    if not keys_as_rows:
        return steps
    return -(-steps // 2) * (2 if key.keys is ScaleLayout.CHANNEL else 1)


def codes_of(raw: NDArray[np.uint8], fmt: str, positions: tuple[Indices, Indices], head_dim: int) -> NDArray[np.uint16]:
    """Return the (pages, 32, head_dim) codes in the (pages, bytes) of a plane."""
    bits = FORMATS[fmt].bits
    words = raw.view(np.uint32)
    shifts = np.arange(32 // bits, dtype=np.uint32) * bits
    elements = words[..., None] >> shifts & np.uint32((1 << bits) - 1)
    elements = elements.reshape(len(raw), words.shape[1] * len(shifts)).astype(np.uint16)
    token, dim = positions
    codes = np.zeros((len(raw), PAGE_TOKENS, head_dim), np.uint16)
    present = dim < head_dim
    codes[:, token[present], dim[present]] = elements[:, present]
    return codes


@np.errstate(invalid="ignore", over="ignore")
def dequantized(codes: NDArray[Any], scales: NDArray[np.uint16], fmt: str, value: bool, exact: str, group: int) -> Float64:
    """Return the (tokens, head_dim) numbers of (pages, 32, head_dim) `codes`; values too large to store are NaN or infinite.

    Parameters
    ----------
    scales : (pages, words) 16-bit words of the scale plane.
    exact : dtype of 16-bit codes.
    group : channels of V that share an int4 scale.
    """
    pages, _, dim = codes.shape
    numbers: NDArray[Any]
    if FORMATS[fmt].is_float:
        numbers = from_bf16_bits(codes) if exact == "bf16" else codes.view(np.float16)
        return np.asarray(numbers, np.float64).reshape(pages * PAGE_TOKENS, dim)
    layout, codec = FORMATS[fmt].values if value else FORMATS[fmt].keys, CODECS[fmt]
    if FORMATS[fmt].signed:
        codes = (codes - _VALUE_OFFSET if value else codes).astype(np.uint8).view(np.int8)
    if layout is ScaleLayout.CHANNEL:
        planes = scales.view(np.float16).reshape(pages, 2, scales.shape[1] // 2)[..., :dim].transpose(1, 0, 2)
    elif layout is ScaleLayout.GROUP:
        planes = scales.reshape(pages, dim // group, PAGE_TOKENS, 2).transpose(3, 0, 2, 1)
    else:
        planes = (scales if layout is ScaleLayout.TOKEN else scales[:, 0])[None]
    dequantize = codec.dequantize_values if value else codec.dequantize_keys
    return dequantize(codes, *planes).reshape(pages * PAGE_TOKENS, dim)
