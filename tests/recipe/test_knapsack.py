"""One item of each group at the least cost within a weight: as good as trying everything."""

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from elastickv.recipe.knapsack import KnapsackItem, least_cost

# Costs that repeat, vanish or differ by orders of magnitude; a weight of 0 is allowed.
COSTS = st.sampled_from((0.0, 1.0, 2.0)) | st.floats(1e-9, 10, allow_subnormal=False)
GROUPS = st.lists(st.lists(st.builds(KnapsackItem, st.integers(0, 12), COSTS), min_size=1, max_size=5), max_size=5)


def totals(items):
    return sum(item.cost for item in items), sum(item.weight for item in items)


@settings(max_examples=400, deadline=None)
@given(GROUPS, st.integers(0, 50))
def test_no_choice_within_the_weight_costs_less_or_as_much_with_less_weight(groups, capacity):
    within = [totals(items) for items in product(*groups) if totals(items)[1] <= capacity]
    chosen = least_cost(groups, capacity)
    if chosen is None:
        assert not within
        return
    cost, weight = totals([group[number] for group, number in zip(groups, chosen, strict=True)])
    assert (cost, weight) == min(within)


def curve(steps, scale):
    """Items of a format's kind: a quarter of the error for every 512 bytes more."""
    return [KnapsackItem(2176 + 64 * step, scale * 4.0 ** (-step / 8)) for step in range(steps)]


def test_many_groups_are_as_cheap_as_a_table_of_all_weights_says():
    groups = [curve(7 + number % 9, 10.0 ** (-(number * 7 % 5))) for number in range(24)]
    for capacity in (24 * 2176, 24 * 2300, 24 * 2450):
        table = {0: 0.0}
        for group in groups:
            added = [(weight + item.weight, cost + item.cost) for weight, cost in table.items() for item in group]
            table = {}
            for weight, cost in added:
                if weight <= capacity and cost < table.get(weight, float("inf")):
                    table[weight] = cost
        chosen = least_cost(groups, capacity)
        cost, weight = totals([group[number] for group, number in zip(groups, chosen, strict=True)])
        assert weight <= capacity and cost == min(table.values())


def test_a_gain_that_fits_is_taken_where_a_larger_one_for_its_weight_does_not_fit():
    groups = [
        [KnapsackItem(0, 10.0), KnapsackItem(6, 0.0)],
        [KnapsackItem(0, 9.0), KnapsackItem(5, 1.0)],
        [KnapsackItem(0, 4.0), KnapsackItem(5, 0.5)],
    ]
    assert least_cost(groups, 10) == [0, 1, 1]
    assert least_cost(groups, 11) == [1, 1, 0]
    assert least_cost(groups, 4) == [0, 0, 0]


def test_without_groups_nothing_is_chosen_and_items_that_are_too_heavy_leave_no_choice():
    assert least_cost([], 0) == []
    assert least_cost([[KnapsackItem(1, 0.0)], [KnapsackItem(2, 0.0)]], 2) is None
