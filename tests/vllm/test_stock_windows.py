"""Blocks are sized for the pages, and those of windowed layers that a stock backend serves fill them."""

from types import SimpleNamespace

import pytest

from elastickv.errors import UsageError
from elastickv.vllm.stock_windows import share_blocks

KV_HEADS, HEAD_DIM = 4, 256
TOKEN_BYTES = KV_HEADS * HEAD_DIM * 2 * 2
PAGE_BYTES = {"int4": 37376, "k8v4": 52224, "int8": 66560}  # of 32 tokens


def windowed(token_bytes=TOKEN_BYTES, sizes=None, **attributes):
    """Return a fake layer of a backend whose blocks are whole multiples of 16 tokens."""
    backend = SimpleNamespace(get_supported_kernel_block_sizes=lambda spec: sizes or [SimpleNamespace(base=16)])
    spec = SimpleNamespace(block_size=16, real_page_size_bytes=16 * token_bytes)
    calls = {"get_attn_backend": lambda: backend, "get_kv_cache_spec": lambda config: spec}
    return SimpleNamespace(sliding_window=1024, **calls, **attributes)


def shared(fmt="int4", layers=None, **cache):
    settings = {"block_size": 16, "user_specified_block_size": False, "kv_cache_dtype_skip_layers": ["sliding_window"]}
    config = SimpleNamespace(cache_config=SimpleNamespace(**(settings | {"skip_page_size_padded": None} | cache)))
    full = SimpleNamespace(sliding_window=None)
    share_blocks(config, [full, *(layers if layers is not None else [windowed()])], PAGE_BYTES[fmt])
    return config.cache_config


@pytest.mark.parametrize(("fmt", "pages", "tokens"), [("int4", 2, 16), ("k8v4", 4, 48), ("int8", 1, 16)])
def test_a_block_has_as_few_pages_as_leave_little_of_it_unused(fmt, pages, tokens):
    cache = shared(fmt)
    assert cache.block_size == 32 * pages and cache.skip_page_size_padded == pages * PAGE_BYTES[fmt]
    assert 0.8 * cache.skip_page_size_padded < tokens * TOKEN_BYTES <= cache.skip_page_size_padded


def test_vllm_does_not_choose_again():
    cache = shared()
    assert cache.user_specified_block_size and cache.kv_cache_dtype_skip_layers == []


def test_the_second_layer_changes_nothing():
    first = shared()
    assert vars(shared(**vars(first))) == vars(first)


@pytest.mark.parametrize("layers", [[], [windowed(kv_sharing_target_layer_name="model.layers.0.attn")]])
def test_without_windows_of_their_own_blocks_are_left_to_vllm(layers):
    cache = shared(layers=layers)
    assert cache.block_size == 16 and cache.skip_page_size_padded is None and not cache.user_specified_block_size


def test_the_size_of_the_user_is_kept():
    cache = shared(block_size=128, user_specified_block_size=True)
    assert cache.block_size == 128 and cache.skip_page_size_padded == 4 * PAGE_BYTES["int4"]


def test_blocks_too_small_for_a_windowed_layer_are_refused():
    with pytest.raises(UsageError, match=r"`block_size=32` has 37,376 B of pages.*give none"):
        shared(block_size=32, user_specified_block_size=True)
    with pytest.raises(UsageError, match=r"a block of 512 tokens has .* serve it with a stock backend"):
        shared(layers=[windowed(64 * TOKEN_BYTES)])


def test_a_backend_with_fixed_sizes_gets_the_largest_that_fits():
    cache = shared(layers=[windowed(sizes=[64, 128])])
    assert cache.skip_page_size_padded >= 64 * TOKEN_BYTES


def test_the_layer_with_the_largest_tokens_decides():
    cache = shared(layers=[windowed(), windowed(2 * TOKEN_BYTES)])
    assert cache.skip_page_size_padded >= 16 * 2 * TOKEN_BYTES
