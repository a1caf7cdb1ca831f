"""Who is measured: our own dense and elastic attention, and the peers installed here."""

from elastickv.bench.contenders.base import Contender, Peer
from elastickv.bench.contenders.ours import filled_caches, ours, random_queries
from elastickv.bench.contenders.peers import PEERS, installed_peers
from elastickv.bench.contenders.rotation import Rotation, plan_rotation

__all__ = [
    "PEERS",
    "Contender",
    "Peer",
    "Rotation",
    "filled_caches",
    "installed_peers",
    "ours",
    "plan_rotation",
    "random_queries",
]
