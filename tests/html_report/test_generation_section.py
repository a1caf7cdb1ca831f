"""Generated texts on the page: made-up figures of a made-up model."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

import elastickv
from elastickv.errors import UsageError
from tests.helpers.report_sections import rows as rows_of
from tests.helpers.report_sections import sections
from tests.html_report.test_frontier_section import of_ratio, result_of


def estimate(mean, half=0.1):
    return {"mean": mean, "low": mean - half * abs(mean), "high": mean + half * abs(mean)}


def compared(mean, full):
    return {"mean": estimate(mean), "difference": None if full is None else estimate(mean - full)}


def figures(rate, full, loops):
    return {
        "repetition": compared(rate, full), "length": compared(2000, 2000), "self_bleu": compared(0.2, 0.25), "texts": 8,
        "first_different": None if full is None else estimate(300), "loops": loops, "repetition_rates": [[rate]] * 8,
    }  # fmt: skip


def generation(context, cache, rate, full=None, loops=0):
    sampled = figures(rate / 2, None if full is None else full / 2, 0)
    return {
        "context": context, "cache": cache, "compress": None, "windows": 8, "tokens": 2000, "samples": 1, "seconds": 1.0,
        "greedy": figures(rate, full, loops) | {"self_bleu": None}, "sampled": sampled,
    }  # fmt: skip


@pytest.fixture
def result():
    return result_of([of_ratio(4096, 4.0, 4.0, 3.2, 0.0035)])


@pytest.fixture
def generated(result):
    rows = [
        generation(context, *row)
        for context in (1024, 4096)
        for row in (("full", 0.2), ("C=4", 0.25, 0.2), ("C=8", 0.97, 0.2, 7))
    ]
    return result | {"generations": rows}


def test_every_cache_stands_beside_full_attention(generated):
    (table,) = sections(elastickv.report(generated))["generations"]["tables"]
    rows = [row for row in rows_of(table) if row["context"] == "4096" and row["texts"] == "greedy"]
    assert [(row["cache"], row["loops"]) for row in rows] == [("full", "0 of 8"), ("C=4", "0 of 8"), ("C=8", "7 of 8")]
    assert rows[2]["repetition, %"] == "97.0 [87.3, 106.7]" and rows[2]["repetition to full, %"] == "77.0 [69.3, 84.7]"
    assert rows[0]["repetition to full, %"] == "" and rows[1]["leaves full at"] == "300 [270, 330]"
    sampled = [row for row in rows_of(table) if row["texts"] == "sampled"]
    assert sampled[1]["self-BLEU, %"] == "20.0 [18.0, 22.0]" and sampled[1]["self-BLEU to full, %"] == "-5.0 [-5.5, -4.5]"


def test_a_chart_for_each_context_has_a_row_for_each_cache(generated):
    made = elastickv.report(generated)
    assert {"generations-1", "generations-2"} <= set(made.figures)
    assert "full greedy 20 %, sampled 10 %; C=4 greedy 25 %, sampled 12.5 %; C=8 greedy 97 %" in made.figures["generations-2"]


def test_a_single_window_has_no_interval(generated):
    for row in generated["generations"]:
        row["windows"] = 1
    (table,) = sections(elastickv.report(generated))["generations"]["tables"]
    assert rows_of(table)[0]["repetition, %"] == "20.0 (no interval)"


def test_without_generated_texts_there_is_no_section(result):
    assert "generations" not in sections(elastickv.report(result))


def test_a_result_without_a_figure_is_refused(generated):
    del generated["generations"][0]["greedy"]["loops"]
    with pytest.raises(UsageError, match=r"lacks generations\[0\]\.greedy\.loops"):
        elastickv.report(generated)
