"""Blocks beside those of other backends, which vLLM pads to one size."""

from types import SimpleNamespace

import pytest
import torch

SLAB_BYTES, KV_HEADS, HEAD_DIM = 4736, 8, 128
BLOCK_BYTES, DENSE_BYTES = KV_HEADS * SLAB_BYTES, 32 * KV_HEADS * HEAD_DIM * 2 * 2


def bind(stride, monkeypatch, blocks=1000):
    """Return what the start says of a window whose blocks are `stride` bytes apart."""
    from elastickv.vllm import model_setup
    from elastickv.vllm.window_cache import WindowCache, WindowShape

    setup, lines = model_setup.ModelSetup.__new__(model_setup.ModelSetup), []
    for level in ("info", "warning"):
        monkeypatch.setattr(model_setup._log, level, lambda text, *arguments: lines.append(text % arguments))
    setup._reported = []
    setup.config = SimpleNamespace(
        cache_config=SimpleNamespace(num_gpu_blocks=blocks),
        model_config=SimpleNamespace(max_model_len=32768),
    )
    shape = WindowShape(
        tokens=128, slab_bytes=SLAB_BYTES, kv_heads=KV_HEADS, head_size=HEAD_DIM, dtype=torch.bfloat16, soft=True
    )
    cache = WindowCache("model.layers.0.attn.window", shape, None, setup._bound)
    setup._layers = {cache.name: cache}
    cache.bind_kv_cache(torch.empty_strided((1000, KV_HEADS, 8, 512), (stride, 4096, 512, 1), dtype=torch.uint8))
    return lines


@pytest.mark.parametrize("times", [1, 4])
def test_blocks_of_their_own_size_or_of_several_pages_are_right(times, monkeypatch):
    (line,) = bind(times * BLOCK_BYTES, monkeypatch)
    assert f"page {BLOCK_BYTES:,} B" in line


def test_the_cache_that_vllm_measures_graphs_with_is_not_reported(monkeypatch):
    """Its worker knows no number of blocks then, and learns it before it allocates the cache that serves."""
    assert bind(BLOCK_BYTES, monkeypatch, blocks=None) == []


def test_padding_that_costs_capacity_is_said(monkeypatch):
    warning, line = bind(65536, monkeypatch)
    assert "65536" in warning
    assert f"page {BLOCK_BYTES:,} B" in line


def test_pages_padded_to_the_size_of_16_bit_are_refused(monkeypatch):
    from elastickv.errors import UsageError

    with pytest.raises(UsageError, match="16 bit"):
        bind(DENSE_BYTES, monkeypatch)


@pytest.mark.parametrize(("dtype", "packed"), [("auto", True), ("elastickv_int4", False)])
def test_layers_that_are_exempt_from_the_dtype_keep_their_size(dtype, packed, monkeypatch):
    """vLLM asks what both take, and sizes blocks so that a page fits the larger."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from elastickv.vllm.attention_backend import ElasticAttentionBackend
    from elastickv.vllm.model_setup import ModelSetup

    setup = SimpleNamespace(slab_bytes=lambda head_dim: SLAB_BYTES, kv_cache_dtype=dtype)
    monkeypatch.setattr(ModelSetup, "newest", lambda: setup)
    spec = FullAttentionSpec(block_size=32, num_kv_heads=KV_HEADS, head_size=HEAD_DIM, dtype=torch.bfloat16)
    assert ElasticAttentionBackend.customize_spec(spec).page_size_bytes == (BLOCK_BYTES if packed else DENSE_BYTES)
