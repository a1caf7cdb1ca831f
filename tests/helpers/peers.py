"""Work for peers, and peers that are made up."""

import pytest

from elastickv.backends import DeviceInfo, load
from elastickv.benchmark.contenders import Contender, PeerWork, Rotation
from elastickv.errors import UsageError
from elastickv.recipe import AttentionShape

SMALL = AttentionShape(2, 4, 2, 64)
CPU = DeviceInfo("cpu", "a processor", None, 2, None, 1 << 20, 1 << 32, 1 << 31, None)


def peer_work(shape=SMALL, context=100, backend="cpu", graph=True):
    """Return work of two copies and four steps; skip the test where the backend has no device."""
    try:
        device = CPU if backend == "cpu" else load(backend)[0].device
    except UsageError as error:
        pytest.skip(str(error))
    return PeerWork(device, 0, shape, context, Rotation(2, 4, 0.0, False), 0, graph)


class FakePeer:
    """A peer whose variants take `milliseconds` a step; a variant that is no contender stands as it is."""

    name = "fake"

    def __init__(self, **variants):
        self._variants = variants

    def version(self):
        return "1.0"

    def variants(self, work):
        return {f"fake-{name}": variant for name, variant in self._variants.items()}


def contender(name, dtype, milliseconds, kv_bytes=1000.0):
    rotation = Rotation(1, 1, kv_bytes, False)
    return lambda: Contender(name, "peer", "1.0", dtype, kv_bytes, rotation, lambda: milliseconds, False, None, None)
