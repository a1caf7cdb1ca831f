"""The chart of the latency of each token of an inference cycle."""

import copy
import json
import xml.etree.ElementTree as ET

import pytest

from elastickv import report
from elastickv.html_report.charts.style import INK, hue
from elastickv.html_report.charts.token_charts import token_chart
from tests.helpers.results import COMMITTED

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

SVG = "{http://www.w3.org/2000/svg}"
STEADY, SLOW = [30.0] * 64, [32.0] * 64
SLOW[3], SLOW[35] = 90.0, 180.0


def test_slow_tokens_stand_out_and_are_named():
    chart = token_chart("tokens", "Each token", {"dense": [STEADY, STEADY], "elastic": [SLOW, SLOW]})
    root = ET.fromstring(chart.svg())
    assert root.get("role") == "img" and root.get("aria-label") == chart.alt
    assert "elastic takes 32 ms for a token in the middle" in chart.alt
    assert "4 (90 ms), 36 (180 ms)" in chart.alt
    assert {"token of the cycle", "dense", "elastic"} <= {text.text for text in root.iter(f"{SVG}text")}
    styles = " ".join(path.get("style", "") for path in root.iter(f"{SVG}path"))
    assert INK in styles and hue(0) in styles  # colors that the page replaces in dark mode


@pytest.mark.parametrize("rounds", [[[0.0, 0.2]], [[0.1, 0.2, 0.3], [0.1, 0.2]], [[1e-9, 1e9]]], ids=str)
def test_odd_latencies_of_a_file_are_drawn(rounds):
    ET.fromstring(token_chart("tokens", "T", {"elastic": rounds}).svg())


def test_the_page_shows_it_where_a_cycle_was_measured():
    value = json.loads((COMMITTED / "cpu" / "short.json").read_text(encoding="utf-8"))
    assert value["inference_cycle"]
    assert "latency-by-token" in report(value).figures
    without = copy.deepcopy(value) | {"inference_cycle": None}
    assert "latency-by-token" not in report(without).figures
