"""Where ours is on or below the others at equal bytes: sentences that are computed from the figures."""

from collections.abc import Sequence
from dataclasses import dataclass

from elastickv.evaluation.evaluation_options import PARTS_METHOD
from elastickv.html_report.charts.style import bounds
from elastickv.html_report.comparisons.method_losses import (
    BY_REFERENCE,
    OWN,
    Bits,
    ComparedMethods,
    MethodLoss,
    read_bits,
    stored_bits,
)

# 8 bits have up to half a bit of scales; C = 16 is a bit, of which a selection reads a little less.
STORED_RANGE, READ_RANGE = (3.5, 8.5), (0.9, 8.5)
_MOST_NAMED = 6


@dataclass(frozen=True)
class Rivalry:
    """Rivals within a range of bits, by what our best at no more bits is to each."""

    below: Sequence[MethodLoss]
    level: Sequence[MethodLoss]
    above: Sequence[tuple[MethodLoss, MethodLoss]]
    alone: Sequence[MethodLoss]


def rivalry(compared: ComparedMethods, bits: Bits, least: float, most: float, by_reference: bool = True) -> Rivalry:
    """Compare each rival with ours of the smallest KL divergence at no more bits.

    Ours is level with a rival that is better where the two intervals overlap.

    Parameters
    ----------
    least, most : the range of the rivals' bits.
    by_reference : whether ours are references, too, or the caches of the device alone.
    """
    own = [one for one in compared.losses if one.method.startswith(OWN) and (by_reference or one.method != BY_REFERENCE)]
    below, level, above, alone = list[MethodLoss](), list[MethodLoss](), list[tuple[MethodLoss, MethodLoss]](), []
    for rival in compared.losses:
        if rival.method.startswith(OWN) or rival.method == PARTS_METHOD or not least <= bits(rival) <= most:
            continue
        candidates = [one for one in own if bits(one) <= bits(rival)]
        if not candidates:
            alone.append(rival)
            continue
        best = min(candidates, key=lambda one: one.loss.kl.estimate)
        if best.loss.kl.estimate <= rival.loss.kl.estimate:
            below.append(rival)
        elif bounds(best.loss.kl)[0] <= bounds(rival.loss.kl)[1]:
            level.append(rival)
        else:
            above.append((rival, best))
    return Rivalry(below, level, above, alone)


def sentences(compared: ComparedMethods) -> list[str]:
    """Return what the figures say of ours at equal stored bits and at equal read bits; nothing without ours or a rival."""
    said = []
    ranges = (("stored", stored_bits, *STORED_RANGE), ("read", read_bits, *READ_RANGE))
    for word, bits, least, most in ranges:
        result = rivalry(compared, bits, least, most)
        count = sum(map(len, (result.below, result.level, result.above, result.alone)))
        if not count or not any(one.method.startswith(OWN) for one in compared.losses):
            continue
        parts = [
            f"{OWN} is at or below {len(result.below)} of {count} rivals between {least:g} and {most:g} {word} bits, with no "
            "more bits"
        ]
        cached = len(rivalry(compared, bits, least, most, by_reference=False).below)
        if cached < len(result.below):
            parts.append(f"{cached} of these with a cache of the device, the others by reference")
        if result.level:
            parts.append(f"within the intervals of {len(result.level)}")
        if result.above:
            worst = sorted(result.above, key=lambda pair: pair[0].loss.kl.estimate / pair[1].loss.kl.estimate)
            named = "; ".join(_against(*pair, bits) for pair in worst[:_MOST_NAMED])
            more = f"; and {len(worst) - _MOST_NAMED} more" if len(worst) > _MOST_NAMED else ""
            parts.append(f"above {len(result.above)}: {named}{more}")
        if result.alone:
            names = ", ".join(f"{one.loss.cache} ({bits(one):.2f})" for one in result.alone[:_MOST_NAMED])
            more = f" and {len(result.alone) - _MOST_NAMED} more" if len(result.alone) > _MOST_NAMED else ""
            parts.append(f"it has nothing at so few {word} bits as {len(result.alone)}: {names}{more}")
        said.append(f"{compared.model}, {compared.context} tokens: " + "; ".join(parts) + ".")
    return said


def _against(rival: MethodLoss, best: MethodLoss, bits: Bits) -> str:
    return (
        f"{rival.loss.cache} at {bits(rival):.2f} bits (KL {rival.loss.kl.estimate:.2g}, ours {best.loss.kl.estimate:.2g} at "
        f"{bits(best):.2f})"
    )
