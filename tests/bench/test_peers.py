"""Peers run the same workload, are named with their version, and are never silently missing."""

import math

import pytest

from elastickv.backends import load
from elastickv.bench.contenders import PEERS, Rotation, installed_peers
from elastickv.bench.contenders.torch_sdpa import TorchSdpa
from elastickv.recipe import AttentionShape

pytest.importorskip("torch", reason="the peer is PyTorch")


def test_torch_runs_on_the_cpu_in_every_form():
    backend, _ = load("cpu")
    ready, refused = TorchSdpa().contenders(backend, AttentionShape(2, 4, 2, 64), 100, Rotation(2, 4, 0.0, False), 0, True)
    names = {contender.name for contender in ready} | set(refused)
    assert names == {f"torch-sdpa-flash{form}-{dtype}" for form in ("", "-folded") for dtype in ("fp32", "bf16")}
    for contender in ready:
        assert contender.kind == "peer"
        assert contender.version == TorchSdpa().version()
        assert math.isfinite(contender.sample())
        assert contender.sample() > 0
        assert not contender.captured
    by_name = {contender.name: contender for contender in ready}
    # 2 planes x 2 sequences x 2 KV heads x 100 tokens x 64 elements.
    assert by_name["torch-sdpa-flash-bf16"].kv_bytes == 2 * 2 * 2 * 100 * 64 * 2


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(TorchSdpa, "version", lambda self: None)
    present, missing = installed_peers()
    assert not any(peer.name == "torch-sdpa" for peer in present)
    assert missing["torch-sdpa"] == "not installed"
    assert len(present) + len(missing) == len(PEERS)
