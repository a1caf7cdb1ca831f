"""The contenders: our own dense and elastic attention, and the installed peers."""

from elastickv.benchmark.contenders.base import Contender, Peer, PeerWork
from elastickv.benchmark.contenders.ours import filled_caches, ours, random_queries
from elastickv.benchmark.contenders.peers import ALL_PEERS, PEERS, ready_peers
from elastickv.benchmark.contenders.rotation import Rotation, plan_rotation

__all__ = [
    "ALL_PEERS",
    "PEERS",
    "Contender",
    "Peer",
    "PeerWork",
    "Rotation",
    "filled_caches",
    "ours",
    "plan_rotation",
    "random_queries",
    "ready_peers",
]
