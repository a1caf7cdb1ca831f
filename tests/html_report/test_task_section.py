"""Scores of tasks on the page: made-up figures of a made-up model."""

import copy

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

import elastickv
from tests.helpers.report_sections import rows as rows_of
from tests.helpers.report_sections import sections


def score(cache, mean, difference, worse=0):
    return {
        "cache": cache, "worse": worse, "better": 0, "scores": [1.0, 0.5],
        "score_percent": {"mean": mean, "low": mean - 5, "high": mean},
        "difference_points": {"mean": difference, "low": difference - 5, "high": difference},
    }  # fmt: skip


def task(name, tokens, *caches):
    return {
        "task": name, "source": f"paper of {name}", "metric": "all", "tokens": tokens, "answer_tokens": 128, "items": 2,
        "chat_template": True, "seconds": 1.0, "skipped": ["compress=64 cannot be met"],
        "caches": [score("full", 75.0, 0.0), score("full, second wording", 70.0, -5.0, 1), *caches],
    }  # fmt: skip


@pytest.fixture
def result():
    model = {
        "name": "a model", "fingerprint": "f00d", "dtype": "fp32", "device": "cpu", "layers": 2, "query_heads": 4,
        "kv_heads": 2, "head_dim": 64,
    }  # fmt: skip
    four = score("C=4", 50.0, -25.0, 1) | {"recipe_hash": "f00d", "read_ratio": 4.1, "stored_ratio": 3.0}
    return {
        "kind": "elastickv-fidelity", "version": 1, "environment": {}, "options": {}, "seconds": 1.0, "model": model,
        "texts": [], "calibration": None, "needle": [], "skipped": [], "suggestion": None, "rows": [],
        "tasks": [task("vt", 4096, four), task("cwe", 4096, four), task("vt", 32768)],
    }  # fmt: skip


def test_each_cache_stands_beside_full_attention_in_both_wordings(result):
    made = elastickv.report(result)
    (table,) = sections(made)["tasks"]["tables"]
    rows = [row for row in rows_of(table) if (row["task"], row["tokens"]) == ("vt", "4096")]
    assert [row["cache"] for row in rows] == ["full", "full, second wording", "C=4"]
    assert (rows[0]["difference, points"], rows[2]["worse / better"]) == ("", "1 / 0")
    assert rows[2]["difference, points"] == "-25.0 [-30.0, -25.0]" and rows[2]["source"] == "paper of vt"
    assert "compress=64 cannot be met" in made.html


def test_a_chart_for_each_length_has_a_row_for_each_task(result):
    made = elastickv.report(result)
    assert {"tasks-1", "tasks-2"} <= set(made.figures) and "tasks-3" not in made.figures
    assert "vt full 75, full, second wording 70, C=4 50; cwe full 75" in made.figures["tasks-1"]


def test_mean_scores_stand_against_the_bits_of_each_method(result):
    """A format reads what it stores; a task that full attention does not solve does not count."""
    by_bits = [
        score("kivi4", 60.0, -15.0) | {"stored_ratio": 3.2},
        score("quest C=8", 40.0, -35.0) | {"read_ratio": 8.0, "stored_ratio": 1.0},
    ]
    for row in result["tasks"][:2]:
        row["caches"] += copy.deepcopy(by_bits)
    unsolved = task("qa", 4096, score("C=4", 0.0, 0.0))
    unsolved["caches"][0]["score_percent"] = {"mean": 5.0, "low": 0.0, "high": 9.0}
    result["tasks"].append(unsolved)
    made = elastickv.report(result)
    said = made.figures["tasks-1-bits"]
    assert "4096 tokens, 2 tasks" in said
    assert "ElasticKV, not calibrated +0 at 3.90" in said and "KIVI +0 at 5.00" in said and "quest +0 at 2.00" in said
    assert "tasks-2-bits" not in made.figures, "no cache was measured at 32768"


def test_scores_are_rows_of_the_downloads(result):
    rows = [row for row in elastickv.report(result).rows() if row["kind"] == "task"]
    assert len(rows) == 8 and {row["task"] for row in rows} == {"vt", "cwe"}
    four = next(row for row in rows if row["cache"] == "C=4")
    assert (four["score_percent"], four["difference_points"], four["ratio_read"], four["items"]) == (50.0, -25.0, 4.1, 2)


def test_without_a_task_there_is_no_section(result):
    other = copy.deepcopy(result)
    other["tasks"] = []
    assert "tasks" not in sections(elastickv.report(other))
