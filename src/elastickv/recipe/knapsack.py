"""The multiple-choice knapsack problem: one item of each group, of the least total cost within a total weight. Exact.

The linear relaxation gives a Lagrange multiplier of weight and a first solution (Sinha and Zoltners 1979). Partial choices are
then extended group by group, and those are dropped that another one beats in both weight and cost, or that at that multiplier
cannot lead below the first solution (Dyer, Riha and Walker 1995).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

_ROUNDING = 1e-9  # share of a sum of costs: a bound that exceeds a known cost by less may be equal to it


@dataclass(frozen=True)
class KnapsackItem:
    """What a group offers: a weight, which is whole, and a cost, both not negative."""

    weight: int
    cost: float


@dataclass(frozen=True)
class _PartialChoice:
    """A choice in the first groups: the total weight and cost, the last item's number, and the choice before it."""

    weight: int
    cost: float
    item: int = -1
    before: "_PartialChoice | None" = None

    def items(self) -> list[int]:
        """Return the number of the item of each group."""
        numbers, partial = list[int](), self
        while partial.before is not None:
            numbers.append(partial.item)
            partial = partial.before
        return numbers[::-1]


def least_cost(groups: Sequence[Sequence[KnapsackItem]], capacity: int) -> list[int] | None:
    """Return the number of one item of each group, of the least total cost with a total weight up to `capacity`.

    Of equal costs it takes the smaller weight. None: not even the lightest items are within the capacity.

    Parameters
    ----------
    groups : none of them empty.
    """
    fronts = [_front(group) for group in groups]
    lightest = [group[front[0]].weight for group, front in zip(groups, fronts, strict=True)]
    if sum(lightest) > capacity:
        return None
    multiplier, known = _relaxed(groups, fronts, capacity)
    penalized = [min(item.cost + multiplier * item.weight for item in group) for group in groups]
    # What the groups from each one on take at least: in weight, and in cost + multiplier * weight.
    least_weight = [*accumulate(reversed(lightest), initial=0)][::-1]
    least_penalized = [*accumulate(reversed(penalized), initial=0.0)][::-1]
    most = (known + multiplier * capacity) * (1 + _ROUNDING)
    partials = [_PartialChoice(0, 0.0)]
    for number, (group, front) in enumerate(zip(groups, fronts, strict=True), start=1):
        extended = [
            _PartialChoice(before.weight + group[item].weight, before.cost + group[item].cost, item, before)
            for before in partials
            for item in front
        ]
        promising = [
            each
            for each in extended
            if each.weight + least_weight[number] <= capacity
            and each.cost + multiplier * each.weight + least_penalized[number] <= most
        ]
        partials = _undominated(promising)
    return partials[-1].items()


def _front(group: Sequence[KnapsackItem]) -> list[int]:
    """Return the items, by weight, that no other item beats in weight and cost."""
    front: list[int] = []
    for number in sorted(range(len(group)), key=lambda n: (group[n].weight, group[n].cost, n)):
        if not front or group[number].cost < group[front[-1]].cost:
            front.append(number)
    return front


def _undominated(partials: list[_PartialChoice]) -> list[_PartialChoice]:
    """Return the choices, by weight, that no other one beats in weight and cost: their costs fall."""
    front: list[_PartialChoice] = []
    for each in sorted(partials, key=lambda partial: (partial.weight, partial.cost)):
        if not front or each.cost < front[-1].cost:
            front.append(each)
    return front


def _relaxed(groups: Sequence[Sequence[KnapsackItem]], fronts: Sequence[Sequence[int]], capacity: int) -> tuple[float, float]:
    """Return the Lagrange multiplier of weight in the linear relaxation, and the cost of a choice within the capacity.

    From the lightest items on, groups go to heavier ones along their convex hulls, in the order of what a unit of weight saves.
    The multiplier is what it saves at the first step that does not fit.
    """
    steps: list[tuple[float, int, KnapsackItem, KnapsackItem]] = []
    for number, (group, front) in enumerate(zip(groups, fronts, strict=True)):
        hull = _hull([group[item] for item in front])
        for lighter, heavier in zip(hull, hull[1:], strict=False):
            steps.append((-_saving(lighter, heavier), number, lighter, heavier))
    chosen = [group[front[0]] for group, front in zip(groups, fronts, strict=True)]
    weight, multiplier = sum(item.weight for item in chosen), 0.0
    for negative, number, lighter, heavier in sorted(steps, key=lambda step: step[:2]):
        if chosen[number] is not lighter:
            continue  # the step before it did not fit
        if weight + heavier.weight - lighter.weight > capacity:
            multiplier = multiplier or -negative
            continue
        weight += heavier.weight - lighter.weight
        chosen[number] = heavier
    return multiplier, math.fsum(item.cost for item in chosen)


def _saving(lighter: KnapsackItem, heavier: KnapsackItem) -> float:
    """Return the cost that a unit of weight saves between two items."""
    return (lighter.cost - heavier.cost) / (heavier.weight - lighter.weight)


def _hull(front: Sequence[KnapsackItem]) -> list[KnapsackItem]:
    """Return the items of a front on its lower convex hull, by weight."""
    hull: list[KnapsackItem] = []
    for item in front:
        while len(hull) > 1 and _saving(hull[-2], hull[-1]) <= _saving(hull[-1], item):
            hull.pop()
        hull.append(item)
    return hull
