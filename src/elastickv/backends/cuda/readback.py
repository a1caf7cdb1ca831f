"""The contents of a cache on a CUDA device, read back and dequantized: for tests, the oracle and accuracy."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastickv.backends.cuda.device import CudaDevice, DeviceMemory
from elastickv.backends.cuda.page_layout import codes_of, dequantized, key_positions, value_positions
from elastickv.backends.cuda.storage import Storage
from elastickv.errors import NonFiniteError
from elastickv.kvcache.checks import beyond_largest_key
from elastickv.kvcache.protocol import StoredHead
from elastickv.kvcache.rounding import from_bf16_bits
from elastickv.recipe import FORMATS, PAGE_TOKENS, Recipe, regions
from elastickv.recipe.regions import retained_tokens
from elastickv.recipe.slab import Slab

_V_CODE_OFFSET = 128
_TOO_LARGE, _NOTHING = 1 << 31, (1 << 32) - 1
_KINDS: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}


@dataclass(frozen=True)
class Contents:
    """The planes of one layer, and how to read them."""

    device: CudaDevice
    storage: Storage
    head_dim: int
    recipe: Recipe
    dtype: str
    paged: bool

    def of(self, head: int, length: int) -> StoredHead:
        """Return the stored tokens of one (sequence, KV head) of `length` tokens."""
        recipe, layout, storage = self.recipe, self.storage.layout, self.storage
        exact_keys, exact_values = (self._rows(m, head, layout.exact_rows) for m in (storage.exact_k, storage.exact_v))
        if recipe.is_dense:
            empty = np.zeros((0, self.head_dim))
            return StoredHead(empty, empty, exact_keys[:length], exact_values[:length])
        split = regions(length, recipe.sinks, recipe.window)
        recent = recipe.sinks + np.arange(split.cold, split.cold + split.recent) % layout.ring
        exact = np.r_[0 : split.sinks, recent].astype(np.int64)
        count = retained_tokens(split.cold, recipe.stride)
        if self.paged:
            cold_keys, cold_values = (self._pages(head, value, split.cold // PAGE_TOKENS) for value in (False, True))
        elif recipe.key_format == "int8":
            cold_keys = self._codes(storage.k_scale, storage.cold_k, head, 0)
            cold_values = self._codes(storage.v_scale, storage.cold_v, head, _V_CODE_OFFSET)
        else:
            cold_keys, cold_values = (self._rows(m, head, layout.cold_rows) for m in (storage.cold_k, storage.cold_v))
        return StoredHead(cold_keys[:count], cold_values[:count], exact_keys[exact], exact_values[exact])

    def pages_read(self, head: int, cold_pages: int) -> NDArray[np.int64]:
        """Return the numbers of the pages that the last decode read: those listed, then those that became cold since."""
        count, fresh = (int(n) for n in self.device.download(self.storage.listed, (2,), np.int32, head * 8))
        numbers = self.device.download(self.storage.lists, (count,), np.int32, head * self.storage.layout.page_capacity * 4)
        return np.concatenate([numbers.astype(np.int64), np.arange(fresh, cold_pages)])

    def _rows(self, plane: DeviceMemory, head: int, rows: int) -> NDArray[np.float64]:
        dtype = self.recipe.exact_dtype(self.dtype)
        kind = np.dtype(_KINDS[dtype])
        raw = self.device.download(plane, (rows, self.head_dim), kind, head * rows * self.head_dim * kind.itemsize)
        return np.asarray(from_bf16_bits(raw) if dtype == "bf16" else raw, np.float64)

    def _pages(self, head: int, value: bool, count: int) -> NDArray[np.float64]:
        """Return the (tokens, head_dim) numbers of the first pages of a head."""
        recipe, dim, layout = self.recipe, self.head_dim, self.storage.layout
        fmt = str(recipe.value_format if value else recipe.key_format)
        group, slab, stride = recipe.v_group(dim), Slab.of(recipe, dim), layout.page_stride
        pages = self.device.download(self.storage.cold_pages, (count, stride), np.uint8, head * layout.page_capacity * stride)
        codes, scales = slab.values if value else slab.keys
        n_scales = FORMATS[fmt].value_scales(dim, group) if value else FORMATS[fmt].key_scales(dim)
        raw = np.ascontiguousarray(pages[:, codes])
        bits = np.ascontiguousarray(pages[:, scales][:, : n_scales.bytes_of(PAGE_TOKENS)]).view(np.uint16)
        positions = value_positions(fmt, dim, group) if value else key_positions(fmt, dim)
        return dequantized(codes_of(raw, fmt, positions, dim), bits, fmt, value, recipe.exact_dtype(self.dtype), group)

    def _codes(self, scales: DeviceMemory, plane: DeviceMemory, head: int, offset: int) -> NDArray[np.float64]:
        rows, dim = self.storage.layout.cold_rows, self.head_dim
        codes = self.device.download(plane, (rows, dim), np.uint8, head * rows * dim)
        bits = self.device.download(scales, (rows,), np.uint16, head * rows * 2)
        signed = (codes - np.uint8(offset)).view(np.int8)
        values: NDArray[np.float64] = signed.astype(np.float64) * from_bf16_bits(bits).astype(np.float64)[:, None]
        return values


def raise_non_finite(words: NDArray[np.uint32], recipe: Recipe) -> None:
    """Raise NonFiniteError if one of the (batch, kv_heads) `words` names a position whose value could not be stored.

    Words are a position, with the highest bit set if the value is finite but too large for the format of K; all bits: none.
    """
    for row, head in np.argwhere(words < _TOO_LARGE):
        raise NonFiniteError(f"a value that is not finite: sequence {row}, KV head {head}, position {words[row, head]}")
    for row, head in np.argwhere(words < _NOTHING):
        raise NonFiniteError(beyond_largest_key(recipe, row, head, int(words[row, head]) - _TOO_LARGE))
