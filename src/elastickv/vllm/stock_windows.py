"""Blocks that pages share with layers whose sliding windows a stock backend serves in 16 bit.

vLLM pads all blocks to the largest. It sizes blocks for the backend of the first layer, which may be the stock one: then pages
are padded to the bytes of 8 or of 16 bit. So the size is chosen here, before vLLM asks layers for their caches.
"""

from collections.abc import Iterable
from typing import Any

from elastickv.errors import UsageError
from elastickv.recipe.formats import PAGE_TOKENS

_PAGES_PER_BLOCK = (1, 2, 4, 8, 16)
# Of a block. More would take longer blocks, of which each request leaves half of one empty, and which windows cannot fill.
_WELL_FILLED = 0.8


def share_blocks(vllm_config: Any, layers: Iterable[Any], page_bytes: int) -> None:
    """Choose the pages of a block so that blocks of windowed layers fill it; without such layers do nothing.

    Parameters
    ----------
    vllm_config : vLLM's, whose `cache_config` is changed: `block_size`, and `skip_page_size_padded`, to which vLLM pads the
        blocks of windowed layers.
    layers : all of the model's layers, those with pages among them.
    page_bytes : of one layer's page of 32 tokens, all KV heads.

    Raises
    ------
    UsageError : if blocks of the user's size hold too few tokens of a windowed layer, or no size does.
    """
    cache = vllm_config.cache_config
    windowed = [layer for layer in layers if _is_stock_window(layer)]
    if not windowed:
        return
    chosen = cache.user_specified_block_size
    choices = [cache.block_size // PAGE_TOKENS] if chosen else _PAGES_PER_BLOCK
    filled = {pages: min(_filled(layer, vllm_config, pages * page_bytes) for layer in windowed) for pages in choices}
    pages = next((each for each in choices if filled[each] >= _WELL_FILLED), max(choices, key=lambda each: filled[each]))
    if not filled[pages]:
        named = f"`block_size={cache.block_size}`" if chosen else f"a block of {choices[-1] * PAGE_TOKENS} tokens"
        remedy = "give none" if chosen else "serve it with a stock backend: leave out ElasticKV's `attention_backend`"
        raise UsageError(
            f"{named} has {pages * page_bytes:,} B of pages, less than the smallest block of the layers with a sliding window: "
            f"{remedy}"
        )
    cache.block_size, cache.skip_page_size_padded = pages * PAGE_TOKENS, pages * page_bytes
    # Otherwise vLLM would choose both again. All layers have their dtype by now.
    cache.user_specified_block_size, cache.kv_cache_dtype_skip_layers = True, []


def _is_stock_window(layer: Any) -> bool:
    return getattr(layer, "sliding_window", None) is not None and getattr(layer, "kv_sharing_target_layer_name", None) is None


def _filled(layer: Any, vllm_config: Any, block_bytes: int) -> float:
    """Return the part of a block that a windowed layer's tokens fill; 0 if no whole block of its backend fits."""
    spec = layer.get_kv_cache_spec(vllm_config)
    token_bytes = spec.real_page_size_bytes // spec.block_size
    most, fitting = block_bytes // token_bytes, [0]
    for size in layer.get_attn_backend().get_supported_kernel_block_sizes(spec):
        base = getattr(size, "base", None)  # of a `MultipleOf`
        tokens = most // base * base if base is not None else size
        fitting.append(tokens if tokens <= most else 0)
    return float(max(fitting) * token_bytes / block_bytes)
