"""What `elastickv run` writes is a result: a report shows it, a comparison reads it, `load` takes it."""

import json

import pytest

import elastickv
from elastickv import UsageError, compare, report
from elastickv.results.kinds.model_result import RUN_KIND, RUN_VERSION
from tests.helpers.pages import EVIL, Page, evil
from tests.helpers.results import COMMITTED, quiet, result, write
from tests.helpers.run_results import run_result

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


def test_the_kind_is_the_one_that_run_writes():
    pytest.importorskip("torch")
    from elastickv.model_benchmark.run import KIND, VERSION

    assert (KIND, VERSION) == (RUN_KIND, RUN_VERSION)


def test_a_report_shows_it_beside_other_results(tmp_path):
    good, ours = write(tmp_path, "good.json", result(quiet(0.5), quiet(1.0))), write(tmp_path, "run.json", run_result())
    made = report(good, ours)
    assert not made.facts.unreadable
    assert [step.context for step in made.facts.steps] == [1024]
    row = next(row for row in Page(made.html).rows if "run.json" in row)
    assert row[:8] == ["tiny float32", "300", "64", "C=2", "elastic", "20.00", "0.500", "97.7 KiB"]
    figures = {row["source"]: row for row in made.rows()}[str(ours)]
    assert (figures["kind"], figures["tokens_per_s"], figures["context"]) == ("model", 20.0, 300)


def test_a_report_of_it_alone_says_what_was_measured_and_that_nothing_ran_beside_it():
    sentence = report(run_result()).content.headline.sentence
    assert (
        "300 tokens × 1, tiny with the cache 'elastic' (C=2) decodes 20.00 tokens/s; no other cache ran beside it" in sentence
    )
    paired = report(run_result(20.0, stock=16.0))
    assert "1.250 times the speed of the cache 'stock' (no interval: fewer than 3 pairs)" in paired.content.headline.sentence
    assert any({"stock", "the same"} <= set(row) for row in Page(paired.html).rows)


def test_a_run_of_one_token_is_shown_with_its_first_token():
    made = report(run_result(None, new_tokens=1))
    assert "made one token, which no decode step gave; no other cache" in made.content.headline.sentence
    assert any("0.500" in row for row in Page(made.html).rows)
    assert compare(run_result(None, new_tokens=1), run_result(None, new_tokens=1, seed=1)).rows[0].figure == "first token"


def test_two_runs_are_compared_by_tokens_per_second_and_bytes():
    comparison = compare(run_result(20.0), run_result(25.0, kv_read_bytes=3.15e6))
    token = next(row for row in comparison.rows if row.figure == "token")
    assert (token.a_ms, token.b_ms, token.verdict, token.ratio) == (50.0, 40.0, "AMBIGUOUS", None)
    assert (token.tokens_per_s_a, token.tokens_per_s_b) == (20.0, 25.0)
    assert (token.kv_bytes_a["read"], token.kv_bytes_b["read"]) == (1e5, 0.5e5)
    from elastickv.results.compare.comparison_table import FORMATS

    shown = FORMATS["table"](comparison)
    for word in ("tokens/s A", "tokens/s B", "KV read A", "20", "25", "97.7 KiB", "48.8 KiB", "no interval"):
        assert word in shown
    assert "kv_read_bytes_a" in FORMATS["csv"](comparison).splitlines()[0]
    assert json.loads(comparison.to_json())["rows"][0]["tokens_per_s_b"] == 25.0
    assert comparison.exit_code("slower") == 3  # one time of each side makes no interval


def test_runs_of_another_prompt_are_no_pair():
    other = run_result()
    other["caches"][0]["prompt_tokens"] = 5000
    with pytest.raises(UsageError, match="prompt tokens=5000"):
        compare(run_result(), other)


def test_a_run_and_a_benchmark_have_nothing_in_common():
    bench = json.loads((COMMITTED / "cpu" / "model-8000.json").read_text(encoding="utf-8"))
    with pytest.raises(UsageError):
        compare(run_result(), bench, allow_different_device=True)


def test_load_takes_it(tmp_path):
    loaded = elastickv.load(write(tmp_path, "run.json", run_result(stock=16.0)))
    assert [row["cache"] for row in loaded.rows()] == ["stock", "elastic"]
    assert loaded.rows()[0]["context"] == 300
    for form in ("table", "csv", "md", "html", "json", "jsonl"):
        assert "tiny" in loaded.shown(form)
    assert "elastic / stock: 1.250 times as fast, no interval: fewer than 3 pairs" in str(loaded)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2"),
        ({"caches": []}, "lacks the elastic cache"),
        ({"caches": 3}, "caches"),
        ({"model": {}}, "model"),
    ],
    ids=str,
)
def test_a_damaged_one_is_named(change, said):
    with pytest.raises(UsageError, match=said):
        report(run_result() | change)


def test_a_hostile_one_is_text():
    value = evil(run_result(stock=16.0))
    value["caches"][-1]["cache"] = "elastic"
    page = Page(report(value, title=EVIL).html)
    assert not {"script", "img"} & set(page.tags)
