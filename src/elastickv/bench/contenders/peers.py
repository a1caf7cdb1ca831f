"""The peers by name. A new one is a file in this folder and a line here."""

from elastickv.bench.contenders.base import Peer
from elastickv.bench.contenders.torch_sdpa import TorchSdpa

PEERS: tuple[Peer, ...] = (TorchSdpa(),)


def installed_peers() -> tuple[list[Peer], dict[str, str]]:
    """Return the peers installed here, and for each other one why it is missing."""
    present = [peer for peer in PEERS if peer.version() is not None]
    missing = {peer.name: "not installed" for peer in PEERS if peer.version() is None}
    return present, missing
