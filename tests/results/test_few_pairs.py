"""Fewer than three pairs make no interval, wherever one would be shown; files that hold such an interval are read."""

import copy
import json

import pytest

from elastickv import compare, report
from elastickv.benchmark.stats.intervals import LEAST_PAIRS, ratio_interval
from elastickv.model_benchmark.speedups import interval_or_none, mean_interval, noise_floor
from elastickv.results.compare.comparison_table import FORMATS as COMPARISON_FORMATS
from elastickv.results.formats.generation_table import generation_table
from elastickv.results.kinds.model_result import RunResult
from elastickv.results.measurement import Measurement
from tests.helpers.results import COMMITTED, GGUF, quiet, result
from tests.helpers.run_results import run_result

SAID = "no interval: fewer than 3 pairs"
ABSURD = {"estimate": 0.014, "low": 5.7e-08, "high": 3.5e9, "level": 0.95, "samples": 2, "block_length": 1}


def gguf(interval):
    """Return a baseline of two samples, with the intervals that a file of this or of an older version holds."""
    made = copy.deepcopy(GGUF) | {"rounds": 2, "speedups": {"q8_0": interval}, "noise_floor": interval}
    for cache in made["caches"]:
        cache |= {"prompt_ms": interval, "step_ms": interval, "prompt_s": [0.2, 0.21], "decode_s": [0.04, 0.05]}
    return made


def model(interval):
    """Return a model's benchmark of two samples."""
    made = json.loads((COMMITTED / "cpu" / "model-8000.json").read_text(encoding="utf-8"))
    made |= {"rounds": 2, "speedups": dict.fromkeys(made["speedups"], interval), "noise_floor": interval}
    for cache in made["caches"]:
        cache |= {"step_ms": interval, "step_s": cache["step_s"][:2]}
    return made


@pytest.mark.parametrize("interval", [None, ABSURD], ids=["null", "of two pairs"])
@pytest.mark.parametrize("made", [gguf, model])
def test_a_models_tables_say_that_there_is_no_interval(made, interval):
    measurement = Measurement(made(interval))
    for form in ("table", "md", "csv", "html"):
        shown = measurement.shown(form)
        assert "5.7e-08" not in shown and "3.5e+09" not in shown and "3500000000" not in shown
        assert SAID in shown or form in ("md", "csv")
    for row in measurement.rows():
        assert {value for name, value in row.items() if name.endswith(("_low", "_high"))} == {None}
    assert any(row["speedup_estimate"] for row in measurement.rows())


@pytest.mark.parametrize("interval", [None, ABSURD], ids=["null", "of two pairs"])
@pytest.mark.parametrize("made", [gguf, model])
def test_a_report_says_it_too(made, interval):
    pytest.importorskip("matplotlib")
    page = report(made(interval))
    assert SAID in page.content.headline.sentence
    assert "(no interval)" in page.html and "95 % interval)" not in page.content.headline.sentence
    assert {row["speedup_low"] for row in page.rows()} == {None}
    assert all(cache.step_ms.low is None for run in page.facts.models for cache in run.caches)
    assert all(cache.step_ms.estimate > 0 for run in page.facts.models for cache in run.caches)


@pytest.mark.parametrize("made", [gguf, model])
def test_a_comparison_gives_no_verdict_on_two_samples(made):
    comparison = compare(made(None), made(None) | {"seed": 7})
    assert {(row.ratio, row.verdict, row.why) for row in comparison.rows} == {
        (None, "AMBIGUOUS", "fewer than 3 samples of a side")
    }
    for form in ("table", "md", "html"):
        assert "no interval" in COMPARISON_FORMATS[form](comparison)
    assert comparison.exit_code("slower") == 3


def two_pairs():
    made = result(quiet(0.5, 1, 2), quiet(1.0, 2, 2))
    made["speedup"] |= {"estimate": 1.84, "low": 0.13, "high": 26.0, "samples": 2}
    made["noise_floor"] = made["speedup"] | {"estimate": 1.0}
    return made


def test_a_step_of_two_pairs_has_no_interval():
    measurement = Measurement(two_pairs())
    for form in ("table", "html"):
        assert f"speed-up 1.840x ({SAID}); A/A 1.000 ({SAID})" in measurement.shown(form)
    (row,) = measurement.rows()
    assert (row["speedup"], row["speedup_low"], row["speedup_high"]) == (1.84, None, None)
    assert compare(two_pairs(), two_pairs() | {"brand": "x"}).rows[0].ratio is None


def test_a_step_of_two_pairs_has_none_on_the_page():
    pytest.importorskip("matplotlib")
    made = report(two_pairs())
    assert f"1.840 times the speed of dense-bf16 ({SAID})" in made.content.headline.sentence
    assert "[0.130, 26.000]" not in made.html
    (step,) = made.facts.steps
    assert all(contender.time_ms.low is None for contender in step.contenders if contender.timing.name == "elastic")


def test_a_text_of_two_turns_says_it():
    shown = generation_table(RunResult.from_dict(run_result(20.0, stock=16.0)))
    assert f"elastic / stock: 1.250 times as fast, {SAID}" in shown
    assert "times as fast" not in generation_table(RunResult.from_dict(run_result(20.0)))


def test_three_pairs_make_an_interval():
    times = [1.0, 1.1, 1.05]
    assert LEAST_PAIRS == 3
    assert interval_or_none(times, times[::-1]) == ratio_interval(times, times[::-1])
    assert interval_or_none(times[:2], times[:2]) is None and mean_interval(times[:2]) is None
    assert mean_interval(times).low < 1.05 < mean_interval(times).high
    assert noise_floor(times * 2) is not None and noise_floor([*times, 1.0, 1.2]) is None


@pytest.mark.parametrize(("of_all_layers", "label"), [(2.5, "1/C of 16 bit, elastic layers"), (None, "1/C of 16 bit")])
def test_a_hybrids_table_says_whose_reads_the_ratio_is(of_all_layers, label):
    record = run_result(20.0)
    own = next(cache for cache in record["caches"] if cache["cache"] == "elastic")
    own |= {"read_ratio": 4.0, "stored_ratio": 3.0, "model_stored_ratio": of_all_layers}
    lines = generation_table(RunResult.from_dict(record)).splitlines()
    assert next(line for line in lines if "1/C" in line).rsplit(None, 1)[0].strip() == label
