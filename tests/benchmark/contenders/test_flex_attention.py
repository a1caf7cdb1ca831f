"""FlexAttention runs our work."""

import shutil

import pytest

from elastickv.benchmark.contenders.flex_attention import FlexAttention
from elastickv.benchmark.contenders.peers import ready_peers
from elastickv.recipe import AttentionShape
from tests.helpers.peers import peer_work

pytest.importorskip("torch.nn.attention.flex_attention", reason="the peer is PyTorch's")


@pytest.mark.skipif(shutil.which("c++") is None, reason="compiles C++")
def test_it_runs_on_the_cpu():
    ready, refused = ready_peers(peer_work(), "flex-attention-bf16")
    assert not refused
    (contender,) = ready
    assert (contender.name, contender.dtype, contender.version) == ("flex-attention-bf16", "bf16", FlexAttention().version())
    assert contender.sample() > 0


def test_without_a_compiler_the_reason_is_said(monkeypatch):
    import torch

    def compile_(*_arguments, **_options):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nin a long list")

    monkeypatch.setattr(torch, "compile", compile_)
    ready, refused = ready_peers(peer_work(), "flex-attention")
    assert not ready
    assert set(refused.values()) == {"InvalidCxxCompiler: No working C++ compiler found"}
    assert set(refused) == {"flex-attention-fp32", "flex-attention-bf16"}


@pytest.mark.gpu
def test_it_runs_on_the_gpu():
    ready, refused = ready_peers(peer_work(AttentionShape(2, 8, 2, 128), 1024, backend="cuda"), "flex-attention")
    assert not refused
    assert ready[0].captured
    assert ready[0].sample() > 0
