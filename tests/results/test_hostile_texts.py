"""Whatever a result file says, its tables, CSV, Markdown and HTML are sound, and send a terminal no command."""

import csv
import io
import json
import re
from functools import partial

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from elastickv import compare
from elastickv.results.compare.comparison_table import FORMATS
from elastickv.results.formats.fidelity_plot import draw
from elastickv.results.formats.fidelity_table import fidelity_tables
from elastickv.results.formats.rows import csv_text, markdown_cell
from elastickv.results.kinds.evaluation_result import EvaluationResult
from elastickv.results.measurement import Measurement
from elastickv.sweeps.sweep_result import Sweep
from tests.helpers.cases import tried
from tests.helpers.hostile import NOT_TEXT, any_text, hostile
from tests.helpers.pages import Page
from tests.helpers.results import COMMITTED, GGUF, INTERVAL, quiet, result, write
from tests.helpers.run_results import run_result


def load(name):
    return json.loads((COMMITTED / name).read_text(encoding="utf-8"))


MEASURED = {
    "bench": result(quiet(0.5), quiet(1.0)),
    "model": load("h100/model-8b-32768x1.json"),
    "gguf": GGUF,
    "run": run_result(stock=15.0, speedup=INTERVAL),
}
EVALUATED = {
    "4096": load("cpu/fidelity-smollm2-135m-4096.json"),
    "needle": load("h200/fidelity-smollm2-135m-instruct-needle.json"),
}
SOME_TEXT = settings(tried(10), phases=(Phase.explicit, Phase.generate))
UNESCAPED_BAR = re.compile(r"(?<!\\)(?:\\\\)*\|")


def check_tables(markdown):
    """Check that every table has as many columns in each line."""
    for lines in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({len(UNESCAPED_BAR.findall(line)) for line in lines.splitlines()}) == 1


def check_csv(text):
    """Check that every line has as many cells, and none is computed."""
    rows = list(csv.reader(io.StringIO(text)))
    assert len({len(row) for row in rows}) == 1
    for cell in (cell for row in rows for cell in row):
        assert not NOT_TEXT.search(cell)
        assert cell.lstrip()[:1] not in ("=", "+", "@")
        assert cell.lstrip()[:1] != "-" or float(cell) < 0


@pytest.mark.parametrize("name", MEASURED)
@SOME_TEXT
@given(random=st.randoms(use_true_random=False))
def test_any_text_of_a_measurement_is_shown_as_text(name, random):
    value = hostile(MEASURED[name], partial(any_text, random))
    measured = Measurement(value)
    texts = {form: measured.shown(form) for form in ("table", "json", "jsonl", "csv", "md", "html")}
    for form, text in texts.items():
        assert not NOT_TEXT.search(text), form
    assert json.loads(texts["json"]) == json.loads(texts["jsonl"]) == measured.as_dict()
    assert len(texts["table"].splitlines()) == texts["table"].count("\n")
    check_csv(texts["csv"])
    check_tables(texts["md"])
    Page(texts["html"])


@pytest.mark.parametrize("name", EVALUATED)
@SOME_TEXT
@given(random=st.randoms(use_true_random=False))
def test_any_text_of_an_evaluation_is_shown_as_text(name, random):
    text = fidelity_tables(EvaluationResult.from_dict(hostile(EVALUATED[name], partial(any_text, random))))
    assert not NOT_TEXT.search(text)
    check_tables(text)


@pytest.mark.parametrize("text", ["$x^2$ \\frac", "\ud800\x00", "x" * 10_000])
def test_an_evaluation_of_any_text_is_drawn(tmp_path, text):
    pytest.importorskip("matplotlib")
    draw(EvaluationResult.from_dict(hostile(EVALUATED["needle"], lambda: text)), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@SOME_TEXT
@given(random=st.randoms(use_true_random=False))
def test_any_text_of_a_sweep_and_of_a_comparison_is_shown_as_text(tmp_path_factory, random):
    folder = tmp_path_factory.mktemp("hostile")
    one = hostile(result(quiet(0.5), quiet(1.0)), partial(any_text, random))
    cell = {"cell": {"seq": 1024, "recipe": any_text(random)}, "status": "ok", "reason": None, **one}
    refused = {"cell": {"seq": 2048, "recipe": any_text(random)}, "status": "refused", "reason": any_text(random)}
    header = {
        "sweep": {"version": 1, "plan_hash": "h", "cells": 2, "axes": {"seq": [1024, 2048]}, "command": [any_text(random)]}
    }
    sweep = Sweep.load(write(folder, "a.jsonl", [header, cell, refused]))
    check_csv(sweep.to_csv())
    check_tables(sweep.to_markdown())
    Page(sweep._repr_html_())
    comparison = compare(one, one)
    compared = {form: shown(comparison) for form, shown in FORMATS.items()}
    check_tables(compared["md"])
    check_csv(compared["csv"])
    Page(compared["html"])
    for text in (sweep.to_csv(), sweep.to_markdown(), sweep._repr_html_(), *compared.values()):
        assert not NOT_TEXT.search(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", "a\\|b"),
        ("a\nb", "a b"),
        ("`a`", "\\`a\\`"),
        ("*a* $b$ ~~c~~", "\\*a\\* \\$b\\$ \\~\\~c\\~\\~"),
        ("_a_ but time_ms", "\\_a\\_ but time_ms"),
        ("&lt;", "\\&lt;"),
        ("[a](b)", "[a]\\(b)"),
        ("a\x1b[2J", "a\\\\x1b[2J"),
    ],
)
def test_markdown_shows_a_cell_as_it_is(text, shown):
    assert markdown_cell(text) == shown


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1+1", "@a", "\t=1", "\r=1", "\n=1", " =1", "\x00=1"])
def test_a_spreadsheet_computes_no_text(text):
    assert csv_text(text).lstrip()[:1] not in ("=", "+", "-", "@")
