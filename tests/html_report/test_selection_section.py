"""Selections that were compared, on the page: made-up figures of a made-up model."""

import copy
import json

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

import elastickv
from tests.helpers.report_sections import rows as rows_of
from tests.helpers.report_sections import sections

# Method, C, MiB read, KL.
FIGURES = [(None, 4, 2.0, 0.01), ("quest", 4, 1.9, 0.03), ("quest", 2, 4.0, 0.004), ("h2o", 4, 2.0, 0.2)]


def estimate(mean):
    return {"mean": mean, "low": mean * 0.9, "high": mean * 1.1}


def row(context, method, ratio, mebibytes, kl):
    values = {"ppl_change_percent": estimate(0.5), "kl": estimate(kl), "top1_percent": estimate(97.5), "full_ppl": 20.0}
    row = {"context": context, "windows": 4, "scored_tokens": 64, "seconds": 1.0, "read_ratio": ratio + 0.1} | values
    row |= {"stored_ratio": 1.5, "step_bytes_read": mebibytes * 2**20, "bytes_stored": 1000}
    if method is None:
        own = {"cache": f"C={ratio}", "compress": ratio, "recipe_hash": "f00d", "recipes": ["int4"], "expected_error": None}
        return row | own
    selection = {
        "method": method,
        "compress": ratio,
        "size": 9,
        "unit": "pages",
        "dense_layers": 0,
        "source": f"paper of {method}",
    }
    return row | {"cache": f"{method} C={ratio}", "compress": None, "selection": selection}


@pytest.fixture
def result():
    model = {
        "name": "a model", "fingerprint": "f00d", "dtype": "fp32", "device": "cpu", "layers": 2, "query_heads": 4,
        "kv_heads": 2, "head_dim": 64,
    }  # fmt: skip
    return {
        "kind": "elastickv-fidelity", "version": 1, "environment": {}, "options": {}, "seconds": 1.0, "model": model,
        "texts": ["a text"], "calibration": None, "needle": [], "skipped": [], "suggestion": None,
        "rows": [row(context, *figures) for context in (1024, 4096) for figures in FIGURES],
    }  # fmt: skip


def test_every_selection_stands_beside_our_recipes_by_read_bytes(result):
    (table,) = sections(elastickv.report(result))["selections"]["tables"]
    rows = rows_of(table)
    shown = [(row["method"], row["cache"], row["bytes read"]) for row in rows if row["context"] == "4096"]
    assert shown == [
        ("ElasticKV, not calibrated", "C=4", "2.0 MiB"),
        ("quest", "quest C=4", "1.9 MiB"),
        ("quest", "quest C=2", "4.0 MiB"),
        ("h2o", "h2o C=4", "2.0 MiB"),
    ]
    assert rows[1]["source"] == "paper of quest" and rows[1]["KL, nats"].startswith("0.0300 [0.0270, 0.0330]")


def test_a_chart_for_each_context_has_a_curve_for_each_method(result):
    made = elastickv.report(result)
    assert {"selections-1", "selections-2"} <= set(made.figures)
    chart = made.figures["selections-2"]
    assert "ElasticKV, not calibrated 0.01 at 2 MiB; quest 0.03 at 1.9 MiB, 0.004 at 4 MiB; h2o 0.2 at 2 MiB." in chart


def test_selections_are_no_points_of_our_own_curves(result):
    made = elastickv.report(result)
    (table,) = sections(made)["fidelity"]["tables"]
    assert "quest" not in json.dumps(table) and "with C=4 at 4096 tokens reads 1/4.10" in made.content.headline.sentence


def test_without_a_selection_there_is_no_section(result):
    other = copy.deepcopy(result)
    other["rows"] = [row for row in other["rows"] if "selection" not in row]
    assert "selections" not in sections(elastickv.report(other))
