"""FlashInfer runs our work, or says why not: most machines do not have it."""

import sys
from dataclasses import replace

import pytest

from elastickv.benchmark.contenders import torch_timing
from elastickv.benchmark.contenders.flash_infer import FlashInfer
from elastickv.benchmark.contenders.peers import ready_peers
from elastickv.recipe import AttentionShape
from tests.helpers.peers import peer_work

pytest.importorskip("torch", reason="the peer is called with PyTorch's tensors")

SINGLE = {f"flashinfer-single{cores}-{dtype}" for cores in ("", "-tc") for dtype in ("bf16", "fp8")}
PAGED = {f"flashinfer-paged{cores}-{dtype}" for cores in ("", "-tc") for dtype in ("bf16", "fp8")}


@pytest.fixture
def cuda_work(monkeypatch):
    """Work for a CUDA device that PyTorch seems to see."""
    for module in ("elastickv.benchmark.contenders.torch_timing", "elastickv.benchmark.contenders.flash_infer"):
        monkeypatch.setattr(sys.modules[module], "unusable", lambda work: None)
    monkeypatch.setattr(FlashInfer, "version", lambda self: "0.0")
    work = peer_work()
    return replace(work, device=replace(work.device, kind="cuda"))


def test_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(FlashInfer, "version", lambda self: None)
    assert ready_peers(peer_work(), "flashinfer") == ([], {"flashinfer": "not installed"})


def test_on_a_cpu_it_says_that_it_needs_cuda(monkeypatch):
    monkeypatch.setattr(FlashInfer, "version", lambda self: "0.0")
    assert ready_peers(peer_work(), "flashinfer") == ([], {"flashinfer": "runs on CUDA devices only"})


def test_every_variant_that_cannot_run_says_why(cuda_work):
    one = FlashInfer().variants(replace(cuda_work, shape=AttentionShape(1, 4, 2, 64)))
    assert set(one) == SINGLE | PAGED
    assert not any(isinstance(variant, str) for variant in one.values())
    several = FlashInfer().variants(cuda_work)
    assert {name for name, variant in several.items() if isinstance(variant, str)} == SINGLE
    assert several["flashinfer-single-bf16"] == "decodes one sequence"
    odd = FlashInfer().variants(replace(cuda_work, shape=AttentionShape(1, 4, 2, 80)))
    assert set(odd.values()) == {"no kernel for head_dim 80: its own are 64, 128, 256"}


def test_installed_but_broken_is_one_line_a_variant(cuda_work, monkeypatch):
    broken = type(sys)("flashinfer")
    monkeypatch.setitem(sys.modules, "flashinfer", broken)

    def no_compiler(*_arguments, **_options):
        raise RuntimeError("Ninja build failed. Ninja output:\n[1/9] nvcc -O3 --errors\n/bin/sh: 1: nvcc: not found")

    broken.single_decode_with_kv_cache = no_compiler
    work = replace(peer_work(AttentionShape(1, 4, 2, 64)), device=cuda_work.device)
    monkeypatch.setattr(
        "elastickv.benchmark.contenders.flash_infer.inputs",
        lambda work, dtype, pages: torch_timing.Inputs(replace(work, device=peer_work().device), dtype, pages),
    )
    monkeypatch.setattr(
        "elastickv.benchmark.contenders.flash_infer.checked",
        lambda name, version, dtype, work, data, attend: attend(0),
    )
    ready, refused = ready_peers(work, "flashinfer-single")
    assert not ready
    assert set(refused) == SINGLE
    assert set(refused.values()) == {"Ninja build failed. Ninja output: /bin/sh: 1: nvcc: not found"}
    _, refused = ready_peers(work, "flashinfer-paged")
    assert all("BatchDecodeWithPagedKVCacheWrapper" in said for said in refused.values())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "context"), [(AttentionShape(1, 8, 2, 128), 1000), (AttentionShape(3, 8, 2, 128), 1024)], ids=["one", "three"]
)
@pytest.mark.parametrize("graph", [True, False])
def test_it_runs_on_the_gpu(shape, context, graph):
    pytest.importorskip("flashinfer")
    work = peer_work(shape, context, backend="cuda", graph=graph)
    ready, refused = ready_peers(work, "flashinfer")
    assert {contender.name for contender in ready} == PAGED | (SINGLE if shape.batch == 1 else set()), refused
    for contender in ready:
        assert contender.is_dense == (contender.dtype == "bf16")
        assert contender.kv_bytes == 2 * shape.batch * shape.kv_heads * context * 128 * (2 if contender.is_dense else 1)
        assert contender.captured == graph
        assert contender.sample() > 0
        contender.close()
