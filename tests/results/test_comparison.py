"""What two sides of results say of each other; no clock is read here."""

import copy
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import elastickv
from elastickv.benchmark.stats.intervals import Interval
from elastickv.errors import UsageError
from elastickv.results.compare.change import fidelity_change, time_change, verdict
from elastickv.results.compare.comparison import compare
from elastickv.results.compare.comparison_table import FORMATS
from elastickv.results.compare.runs import OutputErrors, Times
from tests.helpers.results import COMMITTED, ORIGINAL, quiet, result, write

ROUNDS = 80


def walk(rng, n, step):
    return np.cumsum(rng.standard_normal(n) * step)


def spikes(rng, n):
    return np.where(rng.random(n) < 0.04, rng.uniform(0.2, 1.5, n), 0.0)


# What a machine does to both of a pair, and what it does to each sample by itself: logarithms.
MACHINES = {
    "independent": (lambda rng, n: np.zeros(n), lambda rng, n: rng.standard_normal(n) * 0.02),
    "heavy tails": (lambda rng, n: np.zeros(n), lambda rng, n: rng.standard_t(2.5, n) * 0.01),
    "drift": (
        lambda rng, n: rng.normal(0, 0.1) + np.linspace(0, rng.normal(0, 0.1), n),
        lambda rng, n: rng.standard_normal(n) * 0.01,
    ),
    "random walk": (lambda rng, n: rng.normal(0, 0.1) + walk(rng, n, 0.01), lambda rng, n: rng.standard_normal(n) * 0.01),
    "two clocks": (lambda rng, n: rng.choice([0.0, 0.12], n), lambda rng, n: rng.standard_normal(n) * 0.01),
    "spikes": (lambda rng, n: np.zeros(n), lambda rng, n: rng.standard_normal(n) * 0.01 + spikes(rng, n)),
    "drift, spikes and heavy tails": (
        lambda rng, n: rng.normal(0, 0.1) + walk(rng, n, 0.01),
        lambda rng, n: rng.standard_t(3, n) * 0.008 + spikes(rng, n),
    ),
}  # fmt: skip


def measured(machine, seed, elastic_ms=0.6):
    """Return samples of elastic and of dense as one run of this machine would give them."""
    rng = np.random.default_rng(seed)
    shared, own = MACHINES[machine]
    common = shared(rng, ROUNDS)
    return [ms * np.exp(common + own(rng, ROUNDS)) for ms in (elastic_ms, 1.0)]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("slowdown", "expected"), [(1.0, "SAME"), (1.1, "SLOWER")])
def test_the_verdict_is_right_in_95_percent_of_cells(machine, slowdown, expected):
    cells, right = 100, 0
    for cell in range(cells):
        runs = [measured(machine, [cell, 7, side], 0.6 * factor) for side, factor in ((0, 1.0), (1, slowdown))]
        a, b = ([Times(float(e.mean()), tuple(e), {"dense": tuple(d)}, 5.0)] for e, d in runs)
        right += verdict(time_change(a, b, controlled=True).ratio, 3.0) == expected
    assert right / cells >= 0.95


@pytest.mark.parametrize(("slowdown", "expected"), [(1.0, "SAME"), (1.1, "SLOWER")])
def test_two_sweeps_from_files_to_verdicts(tmp_path, slowdown, expected):
    cells = 40
    for side, factor in (("a", 1.0), ("b", slowdown)):
        lines = [{"sweep": {"cells": cells}}]
        for cell in range(cells):
            made = result(*measured("drift", [cell, 9, ord(side)], 0.6 * factor), seq=1024 + cell)
            lines.append({"cell": {"seq": 1024 + cell}, "status": "ok", **made})
        write(tmp_path, f"{side}.jsonl", lines)
    comparison = compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert len(comparison.rows) == cells
    assert comparison.counts()[expected] / cells >= 0.95


def test_without_control_the_machines_drift_is_in_the_ratio():
    slow_machine = [1.2 * quiet(ms, 5) for ms in (0.6, 1.0)]
    a, b = result(quiet(0.6, 1), quiet(1.0, 2)), result(*slow_machine)
    controlled, raw = compare(a, b).rows[0], compare(a, b, control="none").rows[0]
    assert controlled.verdict == "SAME"
    assert controlled.drift == pytest.approx(1.2, rel=0.01)
    assert controlled.b_ms / controlled.a_ms == pytest.approx(1.2, rel=0.01)
    assert (raw.verdict, raw.control, raw.drift) == ("SLOWER", None, None)
    assert any("--control none" in warning for warning in compare(a, b).warnings)


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_a_machine_that_was_not_the_same_is_no_control(factor):
    a, b = result(quiet(0.6, 1), quiet(1.0, 2)), result(factor * quiet(0.6, 3), factor * quiet(1.0, 4))
    comparison = compare(a, b)
    assert (comparison.rows[0].verdict, comparison.rows[0].ratio) == ("AMBIGUOUS", None)
    assert comparison.rows[0].drift == pytest.approx(factor, rel=0.01)
    assert "the machine was not the same" in FORMATS["table"](comparison)
    assert comparison.outcome("slower") == "inconclusive"


def test_a_change_that_slows_dense_and_elastic_alike_is_told():
    a, b = result(quiet(0.6, 1), quiet(1.0, 2)), result(quiet(0.66, 3), quiet(1.1, 4))
    assert compare(a, b).rows[0].verdict == "SAME"
    assert any("slows dense and elastic alike" in warning for warning in compare(a, b).warnings)
    assert compare(a, b, control="none").rows[0].verdict == "SLOWER"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.98, 1.02, "SAME"), (0.9709, 1.03, "SAME"), (1.04, 1.2, "SLOWER"), (0.8, 0.96, "FASTER"), (1.01, 1.04, "AMBIGUOUS"),
        (0.9, 1.1, "AMBIGUOUS"), (0.95, 0.99, "AMBIGUOUS"), (1.02, 1.2, "AMBIGUOUS"),
    ],
)  # fmt: skip
def test_where_the_interval_lies_is_the_verdict(low, high, expected):
    assert verdict(Interval((low * high) ** 0.5, low, high, 0.95, 50, 1), 3.0) == expected


def test_no_interval_is_ambiguous():
    assert verdict(None, 3.0) == "AMBIGUOUS"


def test_swapping_the_sides_swaps_the_verdict():
    fast, slow = result(quiet(0.6, 1), quiet(1.0, 2)), result(quiet(0.7, 3), quiet(1.0, 4))
    assert compare(fast, slow).rows[0].verdict == "SLOWER"
    assert compare(slow, fast).rows[0].verdict == "FASTER"
    product = compare(fast, slow).rows[0].ratio.estimate * compare(slow, fast).rows[0].ratio.estimate
    assert product == pytest.approx(1)


def test_a_control_is_the_same_contender_on_both_sides():
    a, b = result(quiet(0.6, 1), quiet(1.0, 2)), result(quiet(0.6, 3), quiet(1.1, 4))
    b["baseline"]["name"] = b["contenders"][0]["name"] = "dense-fp16"
    row = compare(a, b).rows[0]
    assert (row.control, row.ratio, row.verdict) == (None, None, "AMBIGUOUS")
    assert "no interval of step: measured against different dense contenders" in FORMATS["table"](compare(a, b))
    assert any("different dense contenders" in warning for warning in compare(a, b).warnings)
    assert compare(a, b).outcome("slower") == "inconclusive"
    assert compare(a, b, control="none").rows[0].verdict == "SAME"


def test_a_peer_of_another_version_is_no_control():
    def with_peer(seed, version):
        made = result(quiet(0.6, seed), quiet(1.0, seed + 1))
        made["baseline"]["name"] = made["contenders"][0]["name"] = "torch-sdpa"
        made["contenders"][0] |= {"kind": "peer", "version": version}
        return made

    assert compare(with_peer(1, "2.5"), with_peer(3, "2.5")).rows[0].control == "torch-sdpa 2.5"
    assert compare(with_peer(1, "2.5"), with_peer(3, "2.6")).rows[0].control is None


def test_from_three_runs_a_side_on_their_own_spread_counts():
    def runs(seed, ms):
        spread = np.random.default_rng(seed).normal(0, 0.05, 6)
        return [result(quiet(ms * math.exp(s), i), quiet(1.0, 9 + i)) for i, s in enumerate(spread)]

    one, six = compare(runs(1, 0.6)[0], runs(2, 0.6)[0]).rows[0], compare(runs(1, 0.6), runs(2, 0.6)).rows[0]
    assert six.ratio.samples == 6
    assert six.ratio.half_width > 10 * one.ratio.half_width
    assert six.verdict == "AMBIGUOUS"


def test_the_cycle_is_a_figure_of_its_own():
    slow = result(cycle=True)
    rounds = slow["inference_cycle"]["raw_token_latencies_ms"]
    rounds["elastic"] = [[1.4 * ms for ms in latencies] for latencies in rounds["elastic"]]
    rows = {row.figure: row for row in compare(result(cycle=True), slow).rows}
    assert rows["cycle of 64"].ratio.estimate == pytest.approx(1.4, rel=1e-6)
    assert (rows["step"].verdict, rows["cycle of 64"].verdict) == ("SAME", "SLOWER")
    assert rows["cycle of 64"].control == "dense-bf16"


def error(mean, p95=None, on="sample"):
    return OutputErrors(on, mean, 3 * mean if p95 is None else p95, 9 * mean, 1e-5)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (error(0.1), error(0.1), "SAME"),
        (error(0.1), error(0.1015), "SAME"),
        (error(0.1), error(0.11), "WORSE"),
        (error(0.1), error(0.09), "BETTER"),
        (error(0.1, 0.2), error(0.09, 0.3), "WORSE"),
        (error(3e-7), error(6e-7), "SAME"),
        (error(0.0), error(0.0), "SAME"),
        (error(0.0), error(0.1), "WORSE"),
        (None, error(0.1), "UNKNOWN"),
        (error(0.1), error(0.1, on="another sample"), "UNKNOWN"),
    ],
)
def test_fidelity_change(a, b, expected):
    assert fidelity_change(a, b, 2.0).verdict == expected


def gate_case(elastic_ms, noise, recipe_error):
    rng = np.random.default_rng(3)
    return result(elastic_ms * np.exp(rng.standard_normal(60) * noise), quiet(1.0), recipe_error=recipe_error)


@pytest.mark.parametrize(
    ("elastic_ms", "noise", "recipe_error", "outcomes"),
    [
        (0.6, 0.003, 0.1, ("pass", "pass", "pass")),
        (0.5, 0.003, 0.1, ("pass", "pass", "pass")),
        (0.7, 0.003, 0.1, ("fail", "pass", "fail")),
        (0.6, 0.003, 0.2, ("pass", "fail", "fail")),
        (0.7, 0.003, 0.2, ("fail", "fail", "fail")),
        (0.6, 0.3, 0.1, ("inconclusive", "pass", "inconclusive")),
        (0.3, 0.3, 0.1, ("pass", "pass", "pass")),
        (0.6, 0.3, 0.2, ("inconclusive", "fail", "fail")),
    ],
)
def test_what_a_gate_says(elastic_ms, noise, recipe_error, outcomes):
    comparison = compare(gate_case(0.6, 0.003, 0.1), gate_case(elastic_ms, noise, recipe_error))
    assert tuple(comparison.outcome(fail_on) for fail_on in ("slower", "fidelity", "any")) == outcomes
    codes = {"pass": 0, "fail": 1, "inconclusive": 3}
    assert [comparison.exit_code(fail_on) for fail_on in ("slower", "fidelity", "any")] == [codes[o] for o in outcomes]
    assert comparison.exit_code(None) == 0


def test_a_cell_that_b_lacks_is_inconclusive_and_named():
    cells = [result(quiet(0.6, seq), quiet(1.0, seq + 1), seq=seq) for seq in (1024, 2048, 4096)]
    fewer, more = compare(cells, cells[:2]), compare(cells[:2], cells)
    assert fewer.outcome("any") == "inconclusive"
    assert more.outcome("any") == "pass"
    assert list(fewer.only_a) == list(more.only_b)
    assert "seq=4096" in next(iter(fewer.only_a))
    assert "only A measured seq=4096" in FORMATS["table"](fewer)


def test_recipes_that_share_what_was_asked_are_not_taken_for_repetitions():
    def windows(seed):
        narrow, wide = result(quiet(0.6, seed), quiet(1.0)), result(quiet(0.8, seed + 1), quiet(1.0))
        wide["recipe"] |= {"text": "int8,stride=2,window=512", "hash": "0"}
        return [narrow, wide]

    rows = compare(windows(1), windows(3)).rows
    assert len(rows) == 2
    assert [round(row.a_ms, 1) for row in rows] == [0.6, 0.8]
    assert {row.verdict for row in rows} == {"SAME"}
    assert "ran=int8,stride=2,window=512" in str(rows[1].cell)


def test_two_single_results_of_one_workload_are_compared_whatever_the_recipe():
    comparison = compare(
        COMMITTED / "h100" / "long-original-schedule.json", COMMITTED / "h100" / "long-stride.json", control="none"
    )
    assert {row.verdict for row in comparison.rows} == {"FASTER"}
    assert {row.fidelity.verdict for row in comparison.rows} == {"WORSE"}
    assert any("recipe differs: A reuse" in warning for warning in comparison.warnings)


def test_the_committed_results_against_themselves():
    comparison = compare(COMMITTED, COMMITTED)
    assert {row.verdict for row in comparison.rows} <= {"SAME", "AMBIGUOUS"}
    assert {row.fidelity.verdict for row in comparison.rows} == {"SAME", "UNKNOWN"}
    assert not comparison.only_a
    assert any("aa_study.json" in warning and "no results" in warning for warning in comparison.warnings)
    assert any(dict(row.cell.pairs).get("model") and row.figure == "token" for row in comparison.rows)


def test_other_devices_are_refused_unless_allowed():
    a, b = result(quiet(0.6, 1), quiet(1.0, 2)), result(quiet(0.3, 3), quiet(0.5, 4), name="Another CPU")
    with pytest.raises(UsageError, match=r"AMD EPYC \(2 threads\).*Another CPU.*`allow_different_device=True`"):
        compare(a, b)
    row = compare(a, b, allow_different_device=True).rows[0]
    assert (row.verdict, row.control) == ("FASTER", None)
    assert row.ratio.estimate == pytest.approx(0.5, rel=0.01)
    assert any("different devices" in warning for warning in compare(a, b, allow_different_device=True).warnings)
    with pytest.raises(UsageError, match="one device with one other"):
        compare([a, b], a, allow_different_device=True)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("gpu", "driver"), "999", "driver differs: A 1, B 999"),
        (("pairing",), "sequential", "pairing differs"),
        (("build", "truncate_percent"), 10.0, "truncation differs"),
        (("environment", "threads"), 1, "threads differs: A 2, B 1"),
        (("environment", "versions", "numba"), "9.9", "numba differs: A 0.68.1, B 9.9"),
        (("complete",), False, "interrupted"),
    ],
)
def test_what_was_done_otherwise_is_told(path, value, named):
    a = result(driver="1")
    b = copy.deepcopy(a)
    place = b
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert not any("differs" in warning for warning in compare(a, a).warnings)
    assert any(named in warning for warning in compare(a, b).warnings)


def test_the_same_run_on_both_sides_is_told():
    a, b = result(quiet(0.6, 1), quiet(1.0, 2)), result(quiet(0.6, 3), quiet(1.0, 4))
    assert any("the same run in 1 of 1 cells" in warning for warning in compare(a, a).warnings)
    assert not any("the same run" in warning for warning in compare(a, b).warnings)


def test_cold_and_hot_are_different_cells():
    cold, hot = [result(seq=1024), result(seq=2048)], [result(seq=1024), result(seq=2048)]
    for made in hot:
        made["configuration"]["cache"] = "hot"
    with pytest.raises(UsageError, match=r"cache=cold.*cache=hot"):
        compare(cold, hot)


def test_results_of_different_workloads_are_refused():
    with pytest.raises(UsageError, match=r"seq=1024.*seq=2048.*one workload"):
        compare(result(), result(seq=2048))


def original(ms, std=0.0006, **changes):
    made = copy.deepcopy(ORIGINAL)
    made["results"] |= {"attention_time_ms": ms, "attention_time_std": std}
    return made | changes


def test_the_original_programs_json_is_compared_by_its_moments():
    row = compare(original(0.06), original(0.0601)).rows[0]
    assert row.verdict == "SAME"
    # Two relative errors of 1 % / sqrt(200), each 1.284 times as large: 5 % cut at either end narrow a normal curve's deviation
    # to 0.789, and the truncated mean's error is 1.013 of the whole mean's. t(398) = 1.966.
    expected = 1.966 * math.hypot(0.01, 0.01) / math.sqrt(200) * 1.013 / 0.789
    assert math.log(row.ratio.high / row.ratio.low) / 2 == pytest.approx(expected, rel=0.01)
    assert compare(original(0.06), original(0.067)).rows[0].verdict == "SLOWER"
    assert compare(original(0.06), original(0.061, 0.01)).rows[0].verdict == "AMBIGUOUS"
    assert compare(original(0.06), original(0.06)).outcome("any") == "inconclusive"


def test_the_originals_cycle_has_no_spread_and_is_ambiguous():
    cycle = {"decode_tokens": 64, "baseline_total_ms": 8.0, "elastic_total_ms": 4.0}
    rows = compare(original(0.06, inference_cycle=cycle), original(0.06, inference_cycle=cycle)).rows
    assert [(row.figure, row.verdict) for row in rows] == [("step", "SAME"), ("cycle of 64", "AMBIGUOUS")]
    assert rows[1].ratio is None


def test_the_original_against_ours_on_one_device_says_what_differs():
    ours = result(quiet(0.05, 1), quiet(0.1, 2), name="NVIDIA GeForce GTX 1070", kind="cuda")
    comparison = compare(original(0.06), ours)
    assert comparison.rows[0].ratio.estimate == pytest.approx(0.05 / 0.06, rel=0.01)
    told = " ".join(comparison.warnings)
    assert "no softmax" in told
    assert "program differs" in told
    assert "dtype differs: A fp32, B bf16" in told


def test_every_format_tells_the_same(tmp_path):
    comparison = compare(result(quiet(0.6, 1), quiet(1.0, 2)), [result(quiet(0.7, 3), quiet(1.0, 4), recipe_error=0.2)])
    shown = {name: form(comparison) for name, form in FORMATS.items()}
    for name, text in shown.items():
        assert "SLOWER" in text, name
        assert "WORSE" in text, name
    plain = json.loads(shown["json"])
    assert plain["kind"] == "elastickv-comparison"
    assert plain["counts"] == {"SAME": 0, "FASTER": 0, "SLOWER": 1, "AMBIGUOUS": 0}
    assert plain["rows"][0]["ratio"]["estimate"] == pytest.approx(7 / 6, rel=0.01)
    assert plain["rows"][0]["cell"]["seq"] == 1024
    assert comparison.to_json() == shown["json"]
    assert json.loads(shown["jsonl"]) == plain["rows"][0]
    header, line = shown["csv"].splitlines()
    assert float(line.split(",")[header.split(",").index("ratio")]) == plain["rows"][0]["ratio"]["estimate"]
    assert comparison._repr_html_() == shown["html"]


def test_html_is_escaped():
    bad = result()
    bad["recipe"]["requested"] = "<script>alert(1)</script>"
    assert "<script>" not in compare(bad, bad)._repr_html_()


def test_a_data_frame_has_a_row_for_each_figure(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    frame = elastickv.compare(result(cycle=True), result(cycle=True)).to_pandas()
    assert [row["figure"] for row in frame] == ["step", "cycle of 64"]
    assert frame[0]["seq"] == 1024
    assert frame[0]["ratio_low"] < 1 < frame[0]["ratio_high"]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="pip install pandas"):
        elastickv.compare(result(), result()).to_pandas()


@pytest.mark.parametrize("options", [{"margin_percent": 0}, {"margin_percent": math.nan}, {"fidelity_margin_percent": 100}])
def test_margins_that_are_none_are_refused(options):
    with pytest.raises(UsageError, match="out of range"):
        compare(result(), result(), **options)


def test_the_example_of_the_documents_runs(tmp_path, monkeypatch, capsys):
    document = COMMITTED.parents[1] / "docs" / "compare.md"
    example = document.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    write(tmp_path, "before.json", result(quiet(0.6, 1), quiet(1.0, 2)))
    write(tmp_path, "after.json", result(quiet(0.7, 3), quiet(1.0, 4)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    names = {}
    exec(example, names)
    assert names["comparison"].outcome("any") == "fail"
    assert json.loads(capsys.readouterr().out)["counts"]["SLOWER"] == 1
