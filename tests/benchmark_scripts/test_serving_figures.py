"""The table of the docs says what a result of the serving benchmark holds; the result here is made up."""

import importlib
from pathlib import Path

import pytest

from elastickv.results.kinds.serving_result import ServingResult
from tests.helpers.serving_results import made_up_serving

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def lines_of():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        made = importlib.import_module("serving_figures").serving_lines
        yield lambda value: made(ServingResult.from_dict(value))


def test_each_contender_has_a_row_with_its_ratios_to_the_baseline(lines_of):
    lines = lines_of(made_up_serving())
    assert "a made-up device" in lines[0] and "FlashAttention 3" in lines[0]
    assert lines[4] == "| `bf16` | 8.00 | 100,000 | 1250 | 1.50 | 25 | 1.07 |"
    assert lines[5] == "| `elastickv_int4` | 6.00 (0.75) | 320,000 (3.20) | 1667 (1.33) | 1.50 (0.75) | 25 | 1.07 |"


def test_what_was_not_measured_is_a_dash_and_what_never_started_has_no_row(lines_of):
    value = made_up_serving()
    value["contenders"][1] |= {"throughput": None, "first_token": None, "graph_bytes": None, "capacity": []}
    assert lines_of(value)[5] == "| `elastickv_int4` | 6.00 (0.75) | - | - | - | 25 | - |"
    value["contenders"][1] |= {"steps": [], "startup_s": []}
    assert not any("elastickv_int4" in line for line in lines_of(value))
