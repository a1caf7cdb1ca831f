"""The line of the start: its figures are those of the slab, the window and the pool, counted here anew."""

import pytest
import torch

from elastickv.vllm.capacity import Capacity
from elastickv.vllm.window_cache import WindowShape

SLAB = 4736  # int4 keys and values of 32 tokens, 128 channels


def line(block_tokens, blocks=1000, longest=8192, layers=32, dtype=torch.bfloat16, tokens=128, slab=SLAB):
    return Capacity(WindowShape(tokens, slab, 8, 128, dtype, True), block_tokens, layers, blocks, longest)


# Tokens of a block of the window: the largest power of two whose 8 x 512 bytes a token fit; then blocks of a request.
@pytest.mark.parametrize(
    ("block_tokens", "window_block", "window_blocks", "pages"),
    [(32, 8, 17, 256), (64, 16, 9, 128), (128, 32, 5, 64)],
)
def test_the_figures_are_those_of_the_pool(block_tokens, window_block, window_blocks, pages):
    """A request of 8192 tokens holds blocks of pages, and as many of the window as 127 tokens touch."""
    found = line(block_tokens)
    block_bytes = 8 * SLAB * (block_tokens // 32)
    assert window_block * 8 * 512 <= block_bytes < 2 * window_block * 8 * 512 or window_block == 32
    assert found.shape.block_tokens(block_tokens) == window_block
    assert found.shape.block_bytes(block_tokens) == block_bytes
    assert max(-(-(offset + 127) // window_block) for offset in range(window_block)) == window_blocks
    assert found.page_bytes == 37888
    assert found.dense_page_bytes == 131072
    assert found.window_bytes == window_blocks * block_bytes * 32
    assert found.tokens == int(1000 / (pages + window_blocks) * 8192)
    assert found.dense_tokens == 1000 * block_bytes // 4096  # 4096 bytes a token and layer in 16 bit
    assert str(found) == (
        f"page 37,888 B, 3.46x smaller than in 16 bit; window 128 tokens, {found.window_bytes / 1e6:.1f} MB a request; "
        f"capacity {found.tokens:,} tokens in requests of 8,192, against {found.dense_tokens:,} in 16 bit"
    )


def test_the_lines_of_blocks_of_32_and_of_128_tokens():
    assert str(line(32)).endswith(
        "window 128 tokens, 20.6 MB a request; capacity 30,007 tokens in requests of 8,192, against 9,250 in 16 bit"
    )
    assert str(line(128)).endswith(
        "window 128 tokens, 24.2 MB a request; capacity 118,724 tokens in requests of 8,192, against 37,000 in 16 bit"
    )


def test_the_last_block_of_a_request_is_counted_whole():
    assert line(32, longest=8161).tokens == int(1000 / (256 + 17) * 8161)
    assert line(32, longest=8160).tokens == int(1000 / (255 + 17) * 8160)


def test_a_window_in_32_bit_has_blocks_of_half_as_many_tokens():
    wide = line(32, dtype=torch.float32)
    assert wide.shape.row_bytes == 1024
    assert wide.shape.block_tokens(32) == 4
    assert wide.shape.blocks_per_request(32) == 33
    assert wide.page_bytes == 37888
    assert wide.dense_page_bytes == 131072  # 16 bit is what it is compared with


@pytest.mark.parametrize("slab", [96, 512, 544, 4736, 8704, 65536])
@pytest.mark.parametrize("block_tokens", [32, 64, 128])
def test_a_block_of_the_window_fits_a_block_of_pages(slab, block_tokens):
    shape = WindowShape(128, slab, 8, 128, torch.bfloat16, True)
    tokens = shape.block_tokens(block_tokens)
    assert tokens in (1, 2, 4, 8, 16, 32)
    if tokens > 1:
        assert tokens * 8 * shape.row_bytes <= shape.block_bytes(block_tokens)
    if tokens < 32:
        assert 2 * tokens * 8 * shape.row_bytes > shape.block_bytes(block_tokens)
