"""The peers by name. A new one is a file in this folder and a line here."""

import re

from elastickv.benchmark.contenders.base import Contender, Peer, PeerWork
from elastickv.benchmark.contenders.flash_attention import FlashAttention3
from elastickv.benchmark.contenders.flash_infer import FlashInfer
from elastickv.benchmark.contenders.flex_attention import FlexAttention
from elastickv.benchmark.contenders.torch_sdpa import TorchSdpa

PEERS: tuple[Peer, ...] = (TorchSdpa(), FlexAttention(), FlashInfer(), FlashAttention3())
ALL_PEERS = "all"
# Seconds of a time limit, below which no package is imported and no variant of one begins.
IMPORT_S, LEAST_S = 5.0, 1.0
_REASON_LENGTH = 200
_TELLING = re.compile(r"error:|not found|no such file", re.IGNORECASE)


def ready_peers(work: PeerWork, names: str = ALL_PEERS) -> tuple[list[Contender], dict[str, str]]:
    """Return the peers' variants that run the work, and why each other requested one does not.

    Parameters
    ----------
    names : 'all', or beginnings of names joined by commas, such as 'torch-sdpa,flashinfer-paged'.
    """
    beginnings = ("",) if names == ALL_PEERS else tuple(name.strip() for name in names.split(","))
    ready: list[Contender] = []
    not_run: dict[str, str] = {}
    for peer in PEERS:
        if not any(peer.name.startswith(start) or start.startswith(peer.name) for start in beginnings):
            continue
        if peer.version() is None:
            not_run[peer.name] = "not installed"
            continue
        try:
            work.require_time(IMPORT_S)
            variants = peer.variants(work)
        except Exception as error:  # a third-party package may raise anything
            not_run[peer.name] = reason(error)
            continue
        for name, variant in variants.items():
            if not name.startswith(beginnings):
                continue
            if isinstance(variant, str):
                not_run[name] = variant
                continue
            try:
                work.require_time(LEAST_S)
                ready.append(variant())
            except Exception as error:  # the same
                not_run[name] = reason(error)
    said = [*(contender.name for contender in ready), *not_run]
    for start in beginnings:
        if not any(name.startswith(start) or start.startswith(name) for name in said):
            not_run[start] = f"no such peer: they are {', '.join(peer.name for peer in PEERS)}"
    return ready, not_run


def reason(error: Exception) -> str:
    """Return an error's message as one short line: of a compiler's output, the line with the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    telling = next((line for line in lines[1:] if _TELLING.search(line)), None)
    text = f"{lines[0]} {telling}" if telling else lines[0]
    return text if len(text) <= _REASON_LENGTH else f"{text[: _REASON_LENGTH - 3]}..."
