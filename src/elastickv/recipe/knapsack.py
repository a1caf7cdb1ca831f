"""The multiple-choice knapsack problem: one item of each group, of the least total cost within a total weight. Exact.

The solution of the linear relaxation gives a price of weight (Sinha and Zoltners 1979). Partial choices are then extended group
by group, and those are dropped that another one beats in both weight and cost, or that cannot lead below a known solution at
that price (Dyer, Riha and Walker 1995).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

_ROUNDING = 1e-9  # share of a sum of costs: a bound that exceeds a known cost by less may be equal to it


@dataclass(frozen=True)
class Item:
    """What a group offers: a weight, which is whole, and a cost, both not negative."""

    weight: int
    cost: float


@dataclass(frozen=True)
class _Partial:
    """A choice in the first groups: the total weight and cost, the last item's number, and the choice before it."""

    weight: int
    cost: float
    item: int = -1
    before: "_Partial | None" = None

    def items(self) -> list[int]:
        """Return the number of the item of each group."""
        numbers, partial = list[int](), self
        while partial.before is not None:
            numbers.append(partial.item)
            partial = partial.before
        return numbers[::-1]


def least_cost(groups: Sequence[Sequence[Item]], capacity: int) -> list[int] | None:
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
    price, known = _relaxed(groups, fronts, capacity)
    priced = [min(item.cost + price * item.weight for item in group) for group in groups]
    # What the groups from each one on take at least: in weight, and in cost with weight at its price.
    least_weight = [*accumulate(reversed(lightest), initial=0)][::-1]
    least_priced = [*accumulate(reversed(priced), initial=0.0)][::-1]
    most = (known + price * capacity) * (1 + _ROUNDING)
    partials = [_Partial(0, 0.0)]
    for number, (group, front) in enumerate(zip(groups, fronts, strict=True), start=1):
        extended = [
            _Partial(before.weight + group[item].weight, before.cost + group[item].cost, item, before)
            for before in partials
            for item in front
        ]
        promising = [
            each
            for each in extended
            if each.weight + least_weight[number] <= capacity and each.cost + price * each.weight + least_priced[number] <= most
        ]
        partials = _undominated(promising)
    return partials[-1].items()


def _front(group: Sequence[Item]) -> list[int]:
    """Return the items, by weight, that no other item beats in weight and cost."""
    front: list[int] = []
    for number in sorted(range(len(group)), key=lambda n: (group[n].weight, group[n].cost, n)):
        if not front or group[number].cost < group[front[-1]].cost:
            front.append(number)
    return front


def _undominated(partials: list[_Partial]) -> list[_Partial]:
    """Return the choices, by weight, that no other one beats in weight and cost: their costs fall."""
    front: list[_Partial] = []
    for each in sorted(partials, key=lambda partial: (partial.weight, partial.cost)):
        if not front or each.cost < front[-1].cost:
            front.append(each)
    return front


def _relaxed(groups: Sequence[Sequence[Item]], fronts: Sequence[Sequence[int]], capacity: int) -> tuple[float, float]:
    """Return the price of a unit of weight in the linear relaxation, and the cost of a choice within the capacity.

    From the lightest items on, groups go to heavier ones along their convex hulls, in the order of what a unit of weight saves.
    The price is what it saves at the first step that does not fit.
    """
    steps: list[tuple[float, int, Item, Item]] = []
    for number, (group, front) in enumerate(zip(groups, fronts, strict=True)):
        hull = _hull([group[item] for item in front])
        for lighter, heavier in zip(hull, hull[1:], strict=False):
            steps.append((-_saving(lighter, heavier), number, lighter, heavier))
    chosen = [group[front[0]] for group, front in zip(groups, fronts, strict=True)]
    weight, price = sum(item.weight for item in chosen), 0.0
    for negative, number, lighter, heavier in sorted(steps, key=lambda step: step[:2]):
        if chosen[number] is not lighter:
            continue  # the step before it did not fit
        if weight + heavier.weight - lighter.weight > capacity:
            price = price or -negative
            continue
        weight += heavier.weight - lighter.weight
        chosen[number] = heavier
    return price, math.fsum(item.cost for item in chosen)


def _saving(lighter: Item, heavier: Item) -> float:
    """Return the cost that a unit of weight saves between two items."""
    return (lighter.cost - heavier.cost) / (heavier.weight - lighter.weight)


def _hull(front: Sequence[Item]) -> list[Item]:
    """Return the items of a front on its lower convex hull, by weight."""
    hull: list[Item] = []
    for item in front:
        while len(hull) > 1 and _saving(hull[-2], hull[-1]) <= _saving(hull[-1], item):
            hull.pop()
        hull.append(item)
    return hull
