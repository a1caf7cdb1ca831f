"""PyTorch's SDPA runs our work, in every form, with its own bytes."""

import math

import pytest

from elastickv.benchmark.contenders.peers import ready_peers
from elastickv.benchmark.contenders.torch_sdpa import TorchSdpa
from elastickv.recipe import AttentionShape
from tests.helpers.peers import peer_work

pytest.importorskip("torch", reason="the peer is PyTorch")


def test_it_runs_on_the_cpu_in_every_form():
    ready, refused = ready_peers(peer_work(), "torch-sdpa")
    names = {contender.name for contender in ready} | set(refused)
    assert names == {f"torch-sdpa-flash{form}-{dtype}" for form in ("", "-folded") for dtype in ("fp32", "bf16")}
    assert ready
    for contender in ready:
        assert contender.kind == "peer"
        assert contender.is_dense
        assert contender.version == TorchSdpa().version()
        assert math.isfinite(contender.sample())
        assert contender.sample() > 0
        assert not contender.captured
        assert contender.error.max < (1e-4 if contender.dtype == "fp32" else 1e-2)
    by_name = {contender.name: contender for contender in ready}
    # 2 planes x 2 sequences x 2 KV heads x 100 tokens x 64 elements.
    assert by_name["torch-sdpa-flash-bf16"].kv_bytes == 2 * 2 * 2 * 100 * 64 * 2


def test_a_head_of_its_own_for_every_query_head_is_not_folded():
    assert set(TorchSdpa().variants(peer_work(AttentionShape(1, 2, 2, 64)))) == {
        "torch-sdpa-flash-fp32",
        "torch-sdpa-flash-bf16",
    }


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False])
def test_it_runs_on_the_gpu(graph):
    ready, refused = ready_peers(peer_work(AttentionShape(2, 8, 2, 128), 1000, backend="cuda", graph=graph), "torch-sdpa")
    assert {contender.name for contender in ready} | set(refused) == {
        f"torch-sdpa-{backend}{form}-bf16" for backend in ("flash", "cudnn", "efficient") for form in ("", "-folded")
    }
    assert {"torch-sdpa-flash-bf16", "torch-sdpa-cudnn-bf16"} <= {contender.name for contender in ready}, refused
    for contender in ready:
        assert contender.captured == graph
        assert contender.sample() > 0
        contender.close()
