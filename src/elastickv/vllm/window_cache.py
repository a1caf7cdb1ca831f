"""The window as a layer of its own: vLLM allocates, frees, prefix-caches and preempts its blocks."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheLayout

from elastickv.errors import UsageError
from elastickv.recipe import Recipe
from elastickv.recipe.calibration import Smoothing
from elastickv.recipe.formats import PAGE_TOKENS
from elastickv.recipe.slab import LAYOUT_VERSION
from elastickv.vllm.step_metadata import WindowMetadataBuilder
from elastickv.vllm.window_spec import WindowSpec

SUFFIX = ".window"


def window_name(layer: str, recipe: Recipe, shape: "WindowShape", smoothing: Smoothing | None = None) -> str:
    """Return vLLM's name of a layer's window. It tells apart what may not be read as each other.

    vLLM's tiers that keep blocks beyond a process (files, objects, peers) know a block by the names of all layers, beside its
    tokens, the model and its KV cache dtype: v1/kv_offload/file_mapper.py. So the name has the version of the layout, the
    formats, the window, the dtype and the sizes of this layer; a calibration is its formats and its smoothing.
    """
    content = [LAYOUT_VERSION, str(recipe), shape.tokens, shape.slab_bytes, shape.kv_heads, shape.head_size, str(shape.dtype)]
    content += [] if smoothing is None else [smoothing]
    return f"{layer}{SUFFIX}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]}"


class WindowBackend(AttentionBackend):
    """The backend of a layer that stores tokens and attends to nothing."""

    @staticmethod
    def get_name() -> str:
        """Return the name in vLLM's messages."""
        return "ELASTICKV_WINDOW"

    @staticmethod
    def get_impl_cls() -> Any:
        """Refuse: the attention of the layer of pages reads the window."""
        raise NotImplementedError("the window has no attention of its own")

    @staticmethod
    def get_builder_cls() -> type[WindowMetadataBuilder]:
        """Return the builder of the window's metadata."""
        return WindowMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the layouts of the pages: both caches share vLLM's memory."""
        return (KVCacheLayout.LBHNC,)


@dataclass(frozen=True)
class WindowShape:
    """What the window of one layer stores.

    Attributes
    ----------
    tokens : newest tokens that are read exactly.
    slab_bytes : bytes of one KV head's page.
    kv_heads, head_size, dtype : of the model's layer, on this rank.
    soft : whether prefix hits do without the window's blocks.
    selects : whether decodes of the model read selected pages.
    """

    tokens: int
    slab_bytes: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    soft: bool
    selects: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's key and value of one KV head."""
        return 2 * self.head_size * self.dtype.itemsize

    def block_bytes(self, page_block_tokens: int) -> int:
        """Return the bytes of a block of pages with `page_block_tokens` tokens, and of the window: vLLM's have one size."""
        return self.kv_heads * self.slab_bytes * page_block_tokens // PAGE_TOKENS

    def block_tokens(self, page_block_tokens: int) -> int:
        """Return the tokens of a block of the window: the largest power of two up to 32 that fits the size of a block."""
        most = self.block_bytes(page_block_tokens) // (self.kv_heads * self.row_bytes)
        return max(size for size in (1, 2, 4, 8, 16, PAGE_TOKENS) if size <= max(most, 1))

    def blocks_per_request(self, page_block_tokens: int) -> int:
        """Return the blocks of the window that a request holds between steps."""
        return -(-(self.tokens - 1) // self.block_tokens(page_block_tokens)) + 1

    def spec(self, vllm_config: Any) -> WindowSpec:
        """Return the specification for vLLM. It is of bytes as pages are: where dtypes differ, vLLM clears reused blocks.

        Raises
        ------
        UsageError : if vLLM's block size makes blocks of the window whose tokens are no power of two.
        """
        steps, page_block_tokens = vllm_config.max_concurrent_batches, vllm_config.cache_config.block_size
        # vLLM makes the window's blocks a whole number of times longer where that gives them the size of the pages' blocks.
        smallest = self.block_tokens(page_block_tokens)
        times, padding = divmod(self.block_bytes(page_block_tokens), smallest * self.kv_heads * self.row_bytes)
        if not padding and times.bit_count() != 1:
            raise UsageError(
                f"`block_size={page_block_tokens}` makes blocks of {times * smallest} exact tokens, and kernels find tokens in "
                f"blocks of a power of two: give `block_size={PAGE_TOKENS}`, or none"
            )
        return WindowSpec(
            block_size=smallest,
            num_kv_heads=self.kv_heads,
            head_size=self.head_size,
            dtype=torch.uint8,
            state_content_bytes=self.row_bytes,
            sliding_window=self.tokens,
            steps_in_flight=steps,
            rollback_tokens=vllm_config.num_speculative_tokens * steps,
            hit_tokens=0 if self.soft else page_block_tokens,
            prompt_hits=self.selects and not self.soft,
        )


class WindowCache(AttentionLayerBase):
    """The window of one attention layer, which vLLM takes for a layer with a sliding window.

    Parameters
    ----------
    attention : `BlockAttention` of the layer that reads the window.
    bound : called with the layer once vLLM has allocated its memory.

    Attributes
    ----------
    name : vLLM's name of this layer.
    kv_cache : (blocks, kv_heads, block_tokens, row_bytes) uint8, each row a token's key, then its value.
    page_block_tokens : tokens of a block of pages. vLLM's own number is another once the caches are planned.
    """

    def __init__(self, name: str, shape: WindowShape, attention: Any, bound: Callable[["WindowCache"], None]) -> None:
        self.name, self.shape, self.attention, self._bound = name, shape, attention, bound
        self.kv_cache, self.page_block_tokens = torch.tensor([]), PAGE_TOKENS

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the memory that vLLM allocated, and call `bound`."""
        self.kv_cache = kv_cache
        if kv_cache.numel():
            self._bound(self)

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Return the backend whose builder makes the window's metadata."""
        return WindowBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> WindowSpec:
        """Return the window's specification."""
        self.page_block_tokens = vllm_config.cache_config.block_size
        return self.shape.spec(vllm_config)
