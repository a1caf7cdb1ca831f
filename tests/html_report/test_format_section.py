"""KV formats that were compared, on the page: made-up figures of a made-up model."""

import copy
import json

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

import elastickv
from tests.helpers.report_sections import rows as rows_of
from tests.helpers.report_sections import sections

# Stored bits and KL: b is beaten by a, d by c.
FIGURES = {"a": (4.5, 0.02), "b": (4.75, 0.05), "c": (5.0, 0.001), "d": (8.5, 0.002), "int4": (9.0, 0.0005)}


def estimate(mean):
    return {"mean": mean, "low": mean * 0.9, "high": mean * 1.1}


def row(name, context, bits, kl):
    stored = {
        "bits_per_element": bits - 0.25, "stored_bits_per_element": bits, "sinks": 0, "exact_keys": 3, "exact_values": 4,
        "source": f"paper of {name}",
    }  # fmt: skip
    values = {"ppl_change_percent": estimate(0.5), "kl": estimate(kl), "top1_percent": estimate(97.5), "full_ppl": 20.0}
    row = {"context": context, "cache": name, "compress": None, "windows": 4, "scored_tokens": 64, "seconds": 1.0} | values
    if name == "int4":
        row |= {"recipe_hash": "f00d", "recipes": ["int4"], "read_ratio": 2.5, "step_bytes_read": 1e6, "expected_error": None}
    return row | {"stored_ratio": 16 / bits, "bytes_stored": 1000, "stored_format": stored}


@pytest.fixture
def result():
    model = {
        "name": "a model", "fingerprint": "f00d", "dtype": "fp32", "device": "cpu", "layers": 2, "query_heads": 4,
        "kv_heads": 2, "head_dim": 64,
    }  # fmt: skip
    return {
        "kind": "elastickv-fidelity", "version": 1, "environment": {}, "options": {}, "seconds": 1.0, "model": model,
        "texts": ["a text"], "calibration": None, "needle": [], "skipped": [], "suggestion": None,
        "rows": [row(name, context, *figures) for context in (1024, 4096) for name, figures in FIGURES.items()],
    }  # fmt: skip


def test_every_format_stands_with_its_bits_and_the_front_is_marked(result):
    (table,) = sections(elastickv.report(result))["formats"]["tables"]
    rows = rows_of(table)
    assert [(row["format"], row["context"]) for row in rows] == [(name, n) for n in ("1024", "4096") for name in FIGURES]
    assert rows[0]["bits"] == "4.250" and rows[0]["stored bits"] == "4.500" and rows[0]["source"] == "paper of a"
    assert rows[2]["KL, nats"].startswith("0.001000 [0.000900, 0.001100]")
    assert [row["format"] for row in rows if row["front"]] == ["a", "c", "int4"] * 2


def test_a_chart_for_each_context_names_the_front(result):
    made = elastickv.report(result)
    assert {"formats-1", "formats-2"} <= set(made.figures)
    chart = made.figures["formats-2"]
    assert "On the Pareto front: a at 4.50 bits 0.02; c at 5.00 bits 0.001; int4 at 9.00 bits 0.0005." in chart
    assert "stored bits an element" in chart and "5 KV formats" in chart


def test_formats_are_no_values_of_c(result):
    made = elastickv.report(result)
    assert not {"kl-1", "perplexity-1"} & set(made.figures) and "fidelity" not in sections(made)
    assert "decodes with 5 KV formats at 4096 tokens, of 4.50 to 9.00 stored bits" in made.content.headline.sentence
    ratio = copy.deepcopy(result["rows"][4]) | {"cache": "C=2", "compress": 2.0}
    del ratio["stored_format"]
    result["rows"].append(ratio)
    assert "with C=2 at 1024 tokens reads 1/2.50" in elastickv.report(result).content.headline.sentence


def test_other_texts_are_another_comparison(result):
    other = copy.deepcopy(result) | {"texts": ["another text"]}
    assert {"formats-1", "formats-2", "formats-3", "formats-4"} <= set(elastickv.report(result, other).figures)


def test_the_rows_have_the_bits(result):
    rows = json.loads(elastickv.report(result).to_json())["rows"]
    assert [(row["bits"], row["stored_bits"]) for row in rows[:2]] == [(4.25, 4.5), (4.5, 4.75)]
