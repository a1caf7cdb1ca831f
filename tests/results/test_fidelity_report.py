"""A fidelity result is shown as tables, and as a figure where matplotlib is there."""

import json
from pathlib import Path

import pytest

from elastickv import report
from elastickv.errors import UsageError
from elastickv.results.formats.fidelity_plot import check_plot, draw
from elastickv.results.formats.fidelity_table import fidelity_tables
from elastickv.results.kinds.evaluation_result import EvaluationResult

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def figure(mean):
    return {"mean": mean, "low": mean - 0.25, "high": mean + 0.25}


def row(context, compress):
    return {
        "context": context,
        "cache": f"C={compress:g}",
        "compress": compress,
        "recipe_hash": f"hash-{compress:g}",
        "read_ratio": compress + 0.01,
        "stored_ratio": compress / 2,
        "ppl_change_percent": figure(compress / 10),
        "kl": figure(compress / 1000),
        "top1_percent": figure(100 - compress),
        "full_ppl": 20.0,
        "windows": 2,
        "scored_tokens": 64,
        "seconds": 1.0,
        "recipes": ["int8"],
        "greedy": {
            "first_different": [12, 13],
            "same_rows": 0,
            "mean_first_different": 12.4,
            "tokens": 32,
            "length_ratio": 1.5,
        },
    }


RESULT = {
    "kind": "elastickv-fidelity",
    "version": 1,
    "environment": {},
    "options": {},
    "seconds": 1.0,
    "model": {
        "name": "a model", "fingerprint": "f00d", "dtype": "fp32", "device": "cpu",
        "layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 64,
    },
    "texts": ["a text"],
    "calibration": None,
    "rows": [row(context, compress) for context in (2048, 4096) for compress in (2, 4)],
    "needle": [{"tokens": 3500, "depths": [0.0, 0.5, 1.0], "found": {"full": [True] * 3, "C=4": [True, False, True]}}],
    "skipped": ["compress=64 cannot be met"],
    "suggestion": {"tolerance": "ppl=0.5%", "compress": 4, "certain": False},
}  # fmt: skip


def evaluated(**changes):
    return EvaluationResult.from_dict(RESULT | changes)


def test_the_tables_hold_every_figure():
    lines = fidelity_tables(evaluated()).splitlines()
    assert "not calibrated" in lines[0]
    (line,) = [line for line in lines if "4096" in line and "hash-4" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3:] == [
        "4.01",
        "2.00",
        "+0.40 [0.15, 0.65]",
        "0.0040 [-0.2460, 0.2540]",
        "96.0 [95.8, 96.2]",
        "12 of 32",
        "1.50",
    ]
    assert any("3/3 xxx" in line and "2/3 x.x" in line for line in lines)
    assert "left out: compress=64 cannot be met" in lines
    assert lines[-1] == "Largest C within ppl=0.5%: 4 (its interval is not: measure more windows)"


def test_what_was_not_measured_is_left_out():
    shown = fidelity_tables(evaluated(needle=[], skipped=[], suggestion=None))
    assert "pass key" not in shown and "Largest" not in shown


def test_a_result_of_tasks_alone_has_no_line_on_windows():
    tasks = json.loads((RESULTS / "h200/task_methods-qwen2.5-coder-0.5b-instruct-4096.json").read_text(encoding="utf-8"))
    text = fidelity_tables(EvaluationResult.from_dict(tasks))
    assert "| fwe" in text and "window" not in text and "texts:" not in text


def test_no_ratio_within_the_tolerance_is_said():
    suggestion = {"tolerance": "ppl=0.5%", "compress": None, "certain": False}
    assert "No C that was measured is within ppl=0.5%." in fidelity_tables(evaluated(suggestion=suggestion))


def test_a_figure_of_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"\.png, \.svg, \.pdf"):
        check_plot(tmp_path / "figure.txt")


def test_without_matplotlib_the_command_that_installs_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("elastickv.results.formats.fidelity_plot.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "elastickv\[report\]"'):
        draw(evaluated(), tmp_path / "figure.svg")


@pytest.mark.parametrize("changes", [{}, {"needle": []}], ids=["with retrieval", "without"])
def test_a_figure_is_drawn(changes, tmp_path):
    pytest.importorskip("matplotlib")
    draw(evaluated(**changes), tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert "<svg" in text


def test_formats_are_drawn_against_their_stored_bits(tmp_path):
    pytest.importorskip("matplotlib")
    stored = {"bits_per_element": 4.5, "stored_bits_per_element": 5.5, "sinks": 0, "exact_keys": 0, "exact_values": 0}
    rows = [row(4096, 2) | {"compress": None, "cache": name, "stored_format": stored | {"source": "a paper"}} for name in "ab"]
    with_ratios, alone = tmp_path / "both.svg", tmp_path / "alone.svg"
    draw(evaluated(rows=[*RESULT["rows"], *rows]), with_ratios)
    draw(evaluated(rows=rows, needle=[]), alone)
    drawn = [file.read_text(encoding="utf-8").count("<!-- stored bits an element -->") for file in (with_ratios, alone)]
    assert drawn == [1, 1] and "dense bytes / bytes read" not in alone.read_text(encoding="utf-8")


def test_a_single_window_has_no_interval_on_a_page(tmp_path):
    """Its bounds in the file are its own figure; an interval of no width would look like certainty."""
    alone = {name: {"mean": 1.0, "low": 1.0, "high": 1.0} for name in ("ppl_change_percent", "kl", "top1_percent")}
    value = RESULT | {"environment": {}, "rows": [row(4096, 2) | alone | {"windows": 1}]}
    file = tmp_path / "alone.json"
    file.write_text(json.dumps(value), encoding="utf-8")
    page = report(file).markdown
    assert "1.00 % (no interval)" in page and "one window alone" in page
    assert "1.00, 1.00" not in page and "(95 % intervals" not in page
