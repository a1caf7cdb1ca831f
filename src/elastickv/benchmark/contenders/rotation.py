"""Cold samples: each rotates through copies of the keys and values that together exceed the last-level cache."""

import math
from dataclasses import dataclass

from elastickv.recipe.formats import round_up

COLD_FACTOR = 2.0
MAX_COPIES = 512


@dataclass(frozen=True)
class Rotation:
    """The number of copies of the keys and values that a sample rotates through, and the number of its steps.

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
    inner_loops : requested steps; rounded up to whole anchor intervals and, if cold, to one whole round.
    cache_bytes : of the last-level cache.
    limit : copies that the memory holds.
    """
    wanted = math.ceil(COLD_FACTOR * cache_bytes / kv_bytes) if cold else 1
    whole_intervals = round_up(wanted, anchor_every)
    most = max(min(limit, MAX_COPIES) // anchor_every * anchor_every, anchor_every)
    copies = min(whole_intervals, most)
    steps = round_up(max(inner_loops, copies), anchor_every)
    touched = copies * kv_bytes
    return Rotation(copies, steps, touched, touched >= COLD_FACTOR * cache_bytes)


def as_cold(rotation: Rotation, kv_bytes: float, cache_bytes: int) -> Rotation:
    """Return `rotation` for a contender that reads `kv_bytes` a step: with more copies where it needs them to stay cold."""
    copies = rotation.copies
    if rotation.cold:
        copies = max(copies, min(math.ceil(COLD_FACTOR * cache_bytes / kv_bytes), MAX_COPIES))
    touched = copies * kv_bytes
    return Rotation(copies, max(rotation.steps, copies), touched, touched >= COLD_FACTOR * cache_bytes)
