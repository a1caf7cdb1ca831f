"""How a sample is kept cold: it goes round copies of the keys and values that exceed the last-level cache."""

import math
from dataclasses import dataclass

COLD_FACTOR = 2.0
MAX_COPIES = 512


@dataclass(frozen=True)
class Rotation:
    """How many copies of the keys and values a sample goes round, and how many steps it takes.

    Attributes
    ----------
    copies, steps : a whole number of anchor intervals each.
    touched_bytes : distinct KV bytes read in one sample.
    cold : whether they exceed the last-level cache `COLD_FACTOR` times.
    """

    copies: int
    steps: int
    touched_bytes: float
    cold: bool


def plan_rotation(kv_bytes: float, inner_loops: int, anchor_every: int, cache_bytes: int, cold: bool, limit: int) -> Rotation:
    """Return the rotation of a contender that reads `kv_bytes` a step.

    Parameters
    ----------
    inner_loops : steps asked for; rounded up to whole anchor intervals, and, if cold, to one whole round.
    cache_bytes : of the last-level cache.
    limit : copies that the memory holds.
    """
    copies = math.ceil(COLD_FACTOR * cache_bytes / kv_bytes) if cold else 1
    copies = max(1, min(copies, limit, MAX_COPIES))
    copies = max(anchor_every, copies // anchor_every * anchor_every if copies < MAX_COPIES else copies)
    copies = math.ceil(copies / anchor_every) * anchor_every
    steps = math.ceil(max(inner_loops, copies) / anchor_every) * anchor_every
    touched = copies * kv_bytes
    return Rotation(copies, steps, touched, touched >= COLD_FACTOR * cache_bytes)
