"""The tables of docs/vllm.md, from a small result of each script."""

import json
import sys
from pathlib import Path

import pytest

from elastickv.results.kinds.serving_result import SERVING_KIND, SERVING_VERSION

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import serving_figures  # noqa: E402


def contender(name, step_ms, tokens, ratio, **values):
    timed = {"context": 1024, "of_baseline": ratio, "samples": []}
    return {
        "contender": name,
        "kv_cache_dtype": "auto",
        "backends": ["vllm.somewhere.Backend"],
        "flash_attention": 3 if name == "bf16" else None,
        "steps": [timed | {"batch": 8, "ms": step_ms}],
        "capacity": [{"context": 1024, "tokens": tokens, "requests": tokens / 1024}],
        "throughput": timed | {"requests": 100, "step_ms": 125.0, "tokens_per_s": 800.0},
        "first_token": timed | {"s": 0.5},
        "startup_s": [31.0, 30.0],
        "graph_bytes": None,
        "peak_bytes": None,
        "failures": [],
    } | values


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Return a function that writes a result of `serving.py` with these contenders."""
    monkeypatch.setattr(serving_figures, "RESULTS", tmp_path)

    def write(*contenders, log=()):
        path = tmp_path / serving_figures.SERVING
        path.parent.mkdir(exist_ok=True)
        record = {
            "kind": SERVING_KIND,
            "version": SERVING_VERSION,
            "command": [],
            "settings": {"rounds": 2, "samples": 3, "prefill": False},
            "dropped": [],
            "model": "shape:8b",
            "weights": "random",
            "baseline": "bf16",
            "device": {"device": "A GPU", "driver": "1.2", "vllm": "0.33.0", "torch": "2.14.0"},
            "environment": {"date_utc": "2026-11-29T17:00:00+00:00", "commit": "0123456789"},
            "contenders": list(contenders),
            "processes": [{"log": list(log)}],
        }
        path.write_text(json.dumps(record), encoding="utf-8")

    return write


def rows(lines):
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {name: values for name, *values in cells}


def test_a_column_for_each_contender_with_its_ratio_to_the_baseline(results):
    ratio = {"estimate": 0.666, "low": 0.65, "high": 0.68}
    results(contender("bf16", 12.0, 1000.0, None), contender("elastickv_int4", 8.0, 3300.0, ratio))
    table = rows(serving_figures.serving())
    assert table[""] == ["`bf16`", "`elastickv_int4`"]
    assert table["step of 8 x 1024, ms"] == ["12.00", "8.00 (0.67x [0.65, 0.68])"]
    assert table["capacity in requests of 1024, tokens"] == ["1,000", "3,300 (3.30x)"]
    assert table["those requests"] == ["100", "100"]
    assert table["start, s"] == ["30", "30"]


def test_what_was_not_measured_is_a_dash_and_its_reason_is_below(results):
    lost = {"steps": [], "capacity": [], "throughput": None, "first_token": None, "failures": ["round 1: out of memory"]}
    results(contender("bf16", 12.0, 1000.0, None), contender("fp8", 1.0, 1.0, None, **lost))
    lines = serving_figures.serving()
    assert rows(lines)["step of 8 x 1024, ms"] == ["12.00", "-"]
    assert rows(lines)["capacity in requests of 1024, tokens"] == ["1,000", "-"]
    assert "- `fp8`, round 1: out of memory" in lines


def test_the_line_of_the_start_is_shown_as_it_was_logged(results):
    said = "ElasticKV: page 1 B; window 2 tokens, 3 MB a request; capacity 4 tokens"
    results(contender("bf16", 12.0, 1000.0, None), log=["GPU KV cache size: 5 tokens", said])
    lines = serving_figures.serving()
    assert lines[lines.index("```text") + 1] == said


def test_the_quality_is_that_of_the_rule_that_serves(tmp_path, monkeypatch):
    monkeypatch.setattr(serving_figures, "RESULTS", tmp_path)
    (tmp_path / "cpu").mkdir()
    figure = {"mean": 0.25, "low": 0.125, "high": 0.5}
    cell = {"format": "int4", "exact_tokens": 128, "kl": figure, "ppl_change_percent": figure, "top1_percent": figure}
    record = {
        "model": "a model",
        "windows": [{}, {}],
        "scored_tokens_of_a_window": 1024,
        "cells": [cell | {"first_page": "as all pages"}, cell | {"first_page": "exact"}],
    }
    (tmp_path / "cpu" / "first_page-a.json").write_text(json.dumps(record), encoding="utf-8")
    _, _, row = serving_figures.serving_quality()
    assert row == "| a model | `int4` | 128 | 0.2500 [0.1250, 0.5000] | 0.25 [0.12, 0.50] | 0.2 [0.1, 0.5] | 2048 |"


def test_without_results_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(serving_figures, "RESULTS", tmp_path)
    assert serving_figures.serving() == serving_figures.serving_quality() == ["Not measured yet."]
