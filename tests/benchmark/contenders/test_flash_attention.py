"""FlashAttention 3 runs our work, or says why not: most machines do not have it."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from elastickv.benchmark.contenders import torch_timing
from elastickv.benchmark.contenders.flash_attention import FlashAttention3
from elastickv.benchmark.contenders.peers import ready_peers
from elastickv.recipe import AttentionShape
from tests.helpers.peers import peer_work

torch = pytest.importorskip("torch", reason="the peer is called with PyTorch's tensors")

NAME = "flash-attention-3-bf16"
MODULE = "elastickv.benchmark.contenders.flash_attention"


@pytest.fixture
def cuda_work(monkeypatch):
    """Work for a CUDA device that PyTorch seems to see; its tensors stay on the CPU."""
    monkeypatch.setattr(f"{MODULE}.unusable", lambda work: None)
    monkeypatch.setattr(FlashAttention3, "version", lambda self: "0.0")
    work = peer_work()
    return replace(work, device=replace(work.device, kind="cuda"))


@pytest.fixture
def package(monkeypatch):
    """A package in the place of vLLM's build."""
    module = type(sys)("vllm.vllm_flash_attn")
    module.is_fa_version_supported = lambda version: True
    module.fa_version_unsupported_reason = lambda version: f"FA{version} needs compute capability 9.0"
    monkeypatch.setitem(sys.modules, "vllm", type(sys)("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", module)
    return module


def test_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(FlashAttention3, "version", lambda self: None)
    assert ready_peers(peer_work(), "flash-attention") == ([], {"flash-attention-3": "not installed"})


def test_on_a_cpu_it_says_that_it_needs_cuda(monkeypatch):
    monkeypatch.setattr(FlashAttention3, "version", lambda self: "0.0")
    assert ready_peers(peer_work(), "flash-attention-3") == ([], {NAME: "runs on CUDA devices only"})


def test_a_device_that_it_does_not_support_is_said(cuda_work, package):
    package.is_fa_version_supported = lambda version: False
    package.flash_attn_varlen_func = None
    assert ready_peers(cuda_work, NAME) == ([], {NAME: "FA3 needs compute capability 9.0"})


def test_every_sequence_has_one_query_over_its_whole_context(cuda_work, package, monkeypatch):
    """What is passed means the attention that the peer is checked against."""

    def varlen(queries, keys, values, *, max_seqlen_q, cu_seqlens_q, max_seqlen_k, seqused_k, causal, fa_version):
        assert (max_seqlen_q, max_seqlen_k, causal, fa_version) == (1, cuda_work.context, True, 3)
        assert cu_seqlens_q.tolist() == list(range(len(queries) + 1)) and cu_seqlens_q.dtype == torch.int32
        assert seqused_k.tolist() == [cuda_work.context] * len(queries)
        heads = [each.transpose(1, 2) for each in (keys, values)]
        return torch.nn.functional.scaled_dot_product_attention(queries[:, :, None], *heads, enable_gqa=True)[:, :, 0]

    package.flash_attn_varlen_func = varlen
    here = replace(cuda_work, device=peer_work().device)
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *sizes, device, **options: arange(*sizes, **options))
    monkeypatch.setattr(f"{MODULE}.inputs", lambda work, dtype: torch_timing.Inputs(here, dtype, None))
    outputs = []

    def checked(name, version, dtype, work, data, attend):
        outputs.append((name, version, attend(1), data.rows[1]))
        return SimpleNamespace(name=name)

    monkeypatch.setattr(f"{MODULE}.checked", checked)
    _, refused = ready_peers(cuda_work, NAME)
    assert refused == {}
    ((name, version, output, (queries, keys, values)),) = outputs
    assert (name, version) == (NAME, "vLLM 0.0")
    expected = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, enable_gqa=True)
    torch.testing.assert_close(output, expected[:, :, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_runs_on_the_gpu(batch, graph):
    pytest.importorskip("vllm")
    work = peer_work(AttentionShape(batch, 8, 2, 128), 1000, backend="cuda", graph=graph)
    (contender,), refused = ready_peers(work, "flash-attention-3")
    assert contender.name == NAME and contender.is_dense and not refused
    assert contender.kv_bytes == 2 * batch * 2 * 1000 * 128 * 2
    assert contender.captured == graph and contender.sample() > 0
    contender.close()
