"""Methods that were compared, on the page: made-up figures of a made-up model."""

import copy
import json

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

import elastickv
from tests.helpers.report_sections import rows as rows_of
from tests.helpers.report_sections import sections

# Stored bits and KL: q4_0_rotated is beaten by q4_0 of its method, q8_0 by kivi4 of another.
FORMATS = {
    "q4_0": (4.5, 0.02),
    "q4_0_rotated": (4.75, 0.05),
    "kivi4": (5.0, 0.001),
    "q8_0": (8.5, 0.002),
    "int4": (9.0, 0.0005),
}
# C, read ratio, stored ratio, KL.
RATIOS = [(2.0, 2.0, 2.0, 0.0015), (4.0, 4.0, 3.2, 0.0035)]
# Method, C, read ratio, KL.
SELECTIONS = [("quest", 4.0, 4.1, 0.03), ("quest", 2.0, 2.05, 0.004), ("h2o", 4.0, 4.0, 0.2)]
OWN = "ElasticKV, not calibrated"


def estimate(mean):
    return {"mean": mean, "low": mean * 0.9, "high": mean * 1.1}


def row(context, name, kl, **more):
    values = {"ppl_change_percent": estimate(0.5), "kl": estimate(kl), "top1_percent": estimate(97.5), "full_ppl": 20.0}
    return {
        "context": context, "cache": name, "compress": None, "windows": 4, "scored_tokens": 64, "seconds": 1.0, **values, **more
    }  # fmt: skip


def of_format(context, name, bits, kl):
    stored = {
        "bits_per_element": bits - 0.25, "stored_bits_per_element": bits, "sinks": 0, "exact_keys": 3, "exact_values": 4,
        "source": f"paper of {name}",
    }  # fmt: skip
    own = {"recipe_hash": "f00d", "recipes": ["int4"], "read_ratio": 16 / bits, "step_bytes_read": 1e6, "expected_error": None}
    return row(
        context, name, kl, stored_ratio=16 / bits, bytes_stored=1000, stored_format=stored, **(own if name == "int4" else {})
    )


def of_ratio(context, compress, read, stored, kl):
    own = {"recipe_hash": "f00d", "recipes": ["int4,pages=1/2"], "expected_error": None, "step_bytes_read": 2.0**20}
    return row(context, f"C={compress:g}", kl, stored_ratio=stored, read_ratio=read, bytes_stored=1000, **own) | {
        "compress": compress
    }


def of_selection(context, method, compress, read, kl):
    selection = {
        "method": method, "compress": compress, "size": 9, "unit": "pages", "dense_layers": 0, "source": f"paper of {method}"
    }  # fmt: skip
    bytes_of = {"stored_ratio": 1.0, "read_ratio": read, "bytes_stored": 1000, "step_bytes_read": 2.0**21}
    return row(context, f"{method} C={compress:g}", kl, selection=selection, **bytes_of)


def result_of(rows):
    model = {
        "name": "a model", "fingerprint": "f00d", "dtype": "fp32", "device": "cpu", "layers": 2, "query_heads": 4,
        "kv_heads": 2, "head_dim": 64,
    }  # fmt: skip
    return {
        "kind": "elastickv-fidelity", "version": 1, "environment": {}, "options": {}, "seconds": 1.0, "model": model,
        "texts": ["a text"], "calibration": None, "needle": [], "skipped": [], "suggestion": None, "rows": rows,
    }  # fmt: skip


@pytest.fixture
def formats():
    return result_of([of_format(context, name, *of) for context in (1024, 4096) for name, of in FORMATS.items()])


@pytest.fixture
def everything(formats):
    for context in (1024, 4096):
        formats["rows"] += [of_ratio(context, *of) for of in RATIOS] + [of_selection(context, *of) for of in SELECTIONS]
    return formats


def test_every_method_stands_with_its_stored_and_read_bits(everything):
    (table,) = sections(elastickv.report(everything))["frontier"]["tables"]
    rows = {row["cache"]: row for row in rows_of(table) if row["context"] == "4096"}
    assert list(rows)[:3] == ["C=4", "C=2", "int4"], "ours first, by stored bits"
    assert set(rows) == {*FORMATS, "C=2", "C=4", "quest C=4", "quest C=2", "h2o C=4"}
    bits = {name: (row["stored bits"], row["read bits"]) for name, row in rows.items()}
    assert bits["q4_0"] == ("4.500", "4.500"), "what a format stores is read at every step"
    assert bits["C=4"] == ("5.000", "4.000") and bits["quest C=4"] == ("16.000", "3.902")
    assert rows["q4_0"]["bits"] == "4.250" and rows["q4_0"]["source"] == "paper of q4_0"
    assert rows["kivi4"]["KL, nats"].startswith("0.001000 [0.000900, 0.001100]")


def test_methods_are_families_of_formats_and_selections(everything):
    (table,) = sections(elastickv.report(everything))["frontier"]["tables"]
    methods = {row["cache"]: row["method"] for row in rows_of(table)}
    assert methods["q4_0"] == methods["q8_0"] == "GGUF blocks" and methods["kivi4"] == "KIVI"
    assert methods["int4"] == methods["C=4"] == OWN and methods["quest C=2"] == "quest"


def test_the_front_is_what_no_other_beats(everything):
    (table,) = sections(elastickv.report(everything))["frontier"]["tables"]
    fronts = {row["cache"]: row["front"] for row in rows_of(table) if row["context"] == "1024"}
    assert fronts["q4_0"] == "stored" and fronts["kivi4"] == fronts["int4"] == "stored, read"
    assert fronts["C=4"] == "read" and fronts["quest C=4"] == "read", "fewest bits are read"
    assert fronts["q8_0"] == fronts["h2o C=4"] == fronts["q4_0_rotated"] == ""


def test_charts_for_each_context_name_each_methods_own_front(everything):
    made = elastickv.report(everything)
    assert {f"frontier-{n}{of}" for n in (1, 2) for of in ("", "-predictions")} <= set(made.figures)
    chart = made.figures["frontier-2"]
    assert "GGUF blocks 0.02 at 4.50, 0.002 at 8.50; KIVI 0.001 at 5.00; quest 0.004 at 16.00" in chart
    assert "stored bits an element" in chart and "bits an element read in a step" in chart
    predictions = made.figures["frontier-1-predictions"]
    assert "quest 2.5 % at 3.90, 2.5 % at 7.80; h2o 2.5 % at 4.00." in predictions
    assert predictions.count("stored bits an element") == 2 == predictions.count("bits an element read in a step")


def test_descriptions_of_charts_have_what_was_measured_where_it_is_below_the_axis(formats):
    formats["rows"] = [of_format(1024, "q4_0", 4.5, 1e-9), of_format(1024, "kivi4", 5.0, 0.02)]
    for row in formats["rows"]:
        row["top1_percent"] = {"mean": 100.0, "low": 100.0, "high": 100.0}
    made = elastickv.report(formats)
    assert "1e-09 at 4.50" in made.figures["frontier-1"] and "0 % at 4.50" in made.figures["frontier-1-predictions"]


def test_the_text_says_by_rule_where_ours_is_on_or_below(everything):
    stored, read, *_ = sections(elastickv.report(everything))["frontier"]["notes"]
    assert stored == (
        "a model, 1024 tokens: ElasticKV is at or below 1 of 4 rivals between 3.5 and 8.5 stored bits, with no more bits; "
        "above 1: kivi4 at 5.00 bits (KL 0.001, ours 0.0035 at 5.00); it has nothing at so few stored bits as 2: q4_0 (4.50), "
        "q4_0_rotated (4.75)."
    )
    assert "at or below 5 of 7 rivals between 0.9 and 8.5 read bits" in read
    assert "nothing at so few read bits as 1: quest C=4 (3.90)" in read


def test_overlapping_intervals_are_level(formats):
    formats["rows"] = [of_format(1024, "int4", 4.4, 0.021), of_format(1024, "q4_0", 4.5, 0.02)]
    (stored, _) = sections(elastickv.report(formats))["frontier"]["notes"]
    assert stored.endswith("below 0 of 1 rivals between 3.5 and 8.5 stored bits, with no more bits; within the intervals of 1.")


def test_formats_are_no_values_of_c(formats):
    made = elastickv.report(formats)
    assert not {"kl-1", "perplexity-1"} & set(made.figures) and "fidelity" not in sections(made)
    assert "decodes with 5 KV formats at 4096 tokens, of 4.50 to 9.00 stored bits" in made.content.headline.sentence
    formats["rows"].append(of_ratio(1024, *RATIOS[0]))
    assert "with C=2 at 1024 tokens reads 1/2.00" in elastickv.report(formats).content.headline.sentence


def test_selections_are_no_points_of_our_own_charts_by_c(everything):
    made = elastickv.report(everything)
    (table,) = sections(made)["fidelity"]["tables"]
    assert "quest" not in json.dumps(table) and "with C=4 at 4096 tokens reads 1/4.00" in made.content.headline.sentence


def test_other_texts_are_another_comparison(formats):
    other = copy.deepcopy(formats) | {"texts": ["another text"]}
    assert {f"frontier-{number}" for number in (1, 2, 3, 4)} <= set(elastickv.report(formats, other).figures)


def test_without_a_format_or_a_selection_there_is_no_section():
    ours = result_of([of_ratio(1024, *of) for of in RATIOS])
    assert "frontier" not in sections(elastickv.report(ours))


def test_the_rows_have_the_bits(formats):
    rows = json.loads(elastickv.report(formats).to_json())["rows"]
    assert [(row["bits"], row["stored_bits"]) for row in rows[:2]] == [(4.25, 4.5), (4.5, 4.75)]


def test_equal_exact_tokens_are_another_comparison(formats):
    other = copy.deepcopy(formats) | {"options": {"exact_tokens": {"sinks": 4, "window": 128}}}
    (table,) = sections(elastickv.report(formats, other))["frontier"]["tables"]
    assert {row["model"] for row in rows_of(table)} == {
        "a model, fp32, a text",
        "a model, fp32, a text, exact tokens 4+128",
    }


def test_what_only_references_reach_is_said(formats):
    formats["rows"] = [
        of_format(1024, "reference:int4", 4.4, 0.01),
        of_format(1024, "int4", 4.6, 0.01),
        of_format(1024, "q4_0", 4.5, 0.02),
        of_format(1024, "kivi4", 5.0, 0.02),
    ]
    (stored, read) = sections(elastickv.report(formats))["frontier"]["notes"]
    said = (
        "below 2 of 2 rivals between {} bits, with no more bits; 1 of these with a cache of the device, the others by "
        "reference."
    )
    assert stored.endswith(said.format("3.5 and 8.5 stored")) and read.endswith(said.format("0.9 and 8.5 read"))
