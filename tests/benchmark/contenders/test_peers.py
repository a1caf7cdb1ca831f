"""Peers are named with their version, chosen by name, and never silently missing."""

import pytest

from elastickv.benchmark.contenders import PEERS, peers
from elastickv.benchmark.contenders.peers import ready_peers, reason
from tests.helpers.peers import FakePeer, contender, peer_work


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_that_is_not_installed_is_named(monkeypatch, peer):
    monkeypatch.setattr(peers, "PEERS", [peer])
    monkeypatch.setattr(type(peer), "version", lambda self: None)
    assert ready_peers(peer_work()) == ([], {peer.name: "not installed"})


def test_every_variant_is_ready_or_has_a_reason(monkeypatch):
    def fails():
        raise ImportError("libcuda.so.1: cannot open\nshared object")

    fake = FakePeer(good=contender("fake-good", "bf16", 1.0), bad=fails, never="decodes one sequence")
    monkeypatch.setattr(peers, "PEERS", [fake])
    ready, not_run = ready_peers(peer_work())
    assert [peer.name for peer in ready] == ["fake-good"]
    assert not_run == {"fake-bad": "libcuda.so.1: cannot open", "fake-never": "decodes one sequence"}


def test_a_package_that_cannot_be_imported_is_a_reason(monkeypatch):
    fake = FakePeer()
    fake.variants = lambda work: {}[""]
    monkeypatch.setattr(peers, "PEERS", [fake])
    assert set(ready_peers(peer_work())[1]) == {"fake"}


def test_peers_are_chosen_by_the_beginnings_of_their_names(monkeypatch):
    made = {name: contender(f"fake-{name}", "bf16", 1.0) for name in ("one-bf16", "one-fp8", "two-bf16")}
    monkeypatch.setattr(peers, "PEERS", [FakePeer(**made)])
    assert [peer.name for peer in ready_peers(peer_work(), "fake-one")[0]] == ["fake-one-bf16", "fake-one-fp8"]
    assert [peer.name for peer in ready_peers(peer_work(), "fake-two, fake-one-fp8")[0]] == ["fake-one-fp8", "fake-two-bf16"]
    ready, not_run = ready_peers(peer_work(), "fake-two,other,fake-three")
    assert [peer.name for peer in ready] == ["fake-two-bf16"]
    assert not_run == {"other": "no such peer: they are fake", "fake-three": "no such peer: they are fake"}


def test_reasons_are_one_short_line():
    assert reason(AssertionError()) == "AssertionError"
    assert reason(RuntimeError("first\nsecond")) == "first"
    assert (
        reason(RuntimeError("build failed\n[1/2] cc --errors\nx.cu(3): error: no type\n"))
        == "build failed x.cu(3): error: no type"
    )
    assert len(reason(RuntimeError("x" * 1000))) == 200
