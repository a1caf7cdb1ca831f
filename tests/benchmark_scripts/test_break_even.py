"""The cells of the break-even guard fill their space, however many are taken."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "break_even.py"
spec = importlib.util.spec_from_file_location("break_even", SCRIPT)
break_even = importlib.util.module_from_spec(spec)
spec.loader.exec_module(break_even)


@pytest.mark.parametrize("count", [40, 200])
def test_cells_fill_the_space_evenly(count):
    cells = list(break_even.cells(count))
    for name, values in (("dim", break_even.HEAD_DIMS), ("group", break_even.GROUPS), ("compress", break_even.RATIOS)):
        seen = Counter(cell[name] for cell in cells)
        assert set(seen) == set(values)
        assert max(seen.values()) <= 2 * min(seen.values())
    assert all(1 <= cell["batch"] <= 64 and 1024 <= cell["seq"] <= 1 << 18 for cell in cells)
    assert cells == list(break_even.cells(count))
