"""Ways to store a page of keys or values: those of the package, and those that were tried and are not in it.

Each is a function from (pages, 32, head_dim) float32 to what the page reads as, and its bytes per token of one KV head, scales
included. Names: `int4` K per channel and page (asymmetric), V per token and head; `int4/32` V with a scale per 32 channels;
`int3`, `int2` the same with fewer bits; `rot` a Hadamard rotation of the head before the quantizer (undone on the query or the
output, free of bytes); `int4token` K as V is stored.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import hadamard

from elastickv.kvcache.quantize import stored_values
from elastickv.kvcache.rounding import rounded
from elastickv.recipe import FORMATS, PAGE_TOKENS

Float32 = NDArray[np.float32]
Store = Callable[[Float32], Float32]


@dataclass(frozen=True)
class Storage:
    """How keys or values are stored."""

    store: Store
    bytes_per_token: float


def package(fmt: str, value: bool, group: int, head_dim: int) -> Storage:
    """Return a storage of the package: the quantizer that every backend must equal."""

    def store(pages: Float32) -> Float32:
        rows = pages.reshape(-1, pages.shape[-1])
        return stored_values(rows, fmt, value, group).reshape(pages.shape).astype(np.float32)

    scales = FORMATS[fmt].value_scales(head_dim, group) if value else FORMATS[fmt].key_scales(head_dim)
    per_token = 4 * head_dim / group if fmt == "int4" and value else scales.n_bytes / min(scales.tokens, PAGE_TOKENS)
    return Storage(store, FORMATS[fmt].bits * head_dim / 8 + per_token)


def shared_scale(rows: Float32, levels: int, group: int) -> Float32:
    """Round rows of values in groups of channels, scale and zero in bf16 (nearest: to try, not to keep)."""
    grouped = rows.reshape(*rows.shape[:-1], -1, group)
    zero = rounded(grouped.min(axis=-1, keepdims=True), "bf16")
    scale = rounded((grouped.max(axis=-1, keepdims=True) - zero) / levels, "bf16")
    codes = np.clip(np.rint((grouped - zero) / np.where(scale > 0, scale, 1)), 0, levels)
    return (codes * scale + zero).reshape(rows.shape).astype(np.float32)


def channel_scale(pages: Float32, levels: int) -> Float32:
    """Round pages of keys per channel, scale and zero in fp16."""
    zero = rounded(pages.min(axis=1, keepdims=True), "fp16")
    scale = rounded((pages.max(axis=1, keepdims=True) - zero) / levels, "fp16")
    codes = np.clip(np.rint((pages - zero) / np.where(scale > 0, scale, 1)), 0, levels)
    return (codes * scale + zero).astype(np.float32)


def rotated(store: Store, head_dim: int) -> Store:
    """Return `store` between a Hadamard rotation and its inverse."""
    turn = (hadamard(head_dim) / np.sqrt(head_dim)).astype(np.float32)
    return lambda pages: store(pages @ turn) @ turn.T


def tried(head_dim: int) -> dict[str, tuple[Storage, Storage]]:
    """Return (keys, values) storages that are not in the package, by name."""
    bits = {4: 15, 3: 7, 2: 3}

    def keys(n: int, turn: bool = False) -> Storage:
        store: Store = lambda pages: channel_scale(pages, bits[n])  # noqa: E731
        return Storage(rotated(store, head_dim) if turn else store, n * head_dim / 8 + 4 * head_dim / 32)

    def values(n: int, group: int = head_dim, turn: bool = False) -> Storage:
        store: Store = lambda pages: shared_scale(pages, bits[n], group)  # noqa: E731
        return Storage(rotated(store, head_dim) if turn else store, n * head_dim / 8 + 4 * head_dim / group)

    pairs = {}
    for k, v in ((4, 3), (3, 4), (4, 2), (3, 3), (2, 4), (2, 2)):
        pairs[f"k=int{k},v=int{v}"] = (keys(k), values(v))
        pairs[f"k=int{k},v=int{v}/32"] = (keys(k), values(v, 32))
        pairs[f"k=int{k},v=int{v},rot v"] = (keys(k), values(v, turn=True))
        pairs[f"k=int{k},v=int{v},rot k v"] = (keys(k, turn=True), values(v, turn=True))
    pairs["int4,rot k"] = (keys(4, turn=True), values(4))
    pairs["int4,rot v"] = (keys(4), values(4, turn=True))
    pairs["int4,rot k v"] = (keys(4, turn=True), values(4, turn=True))
    pairs["k=int4token,v=int4"] = (values(4), values(4))
    pairs["k=int4token,v=int4,rot k"] = (values(4, turn=True), values(4))
    return pairs
