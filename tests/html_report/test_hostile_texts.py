"""Whatever a result file says, the page, its charts and the Markdown are sound, and show it as text."""

import csv
import gzip
import io
import json
import re
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from elastickv import report
from elastickv.html_report.charts.style import shown
from tests.helpers.browser import Visit, browser
from tests.helpers.cases import tried
from tests.helpers.hostile import NOT_TEXT, any_text, hostile
from tests.helpers.pages import Page
from tests.helpers.results import COMMITTED, GGUF, INTERVAL, ORIGINAL, quiet, result, write
from tests.helpers.run_results import run_result

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


def load(name):
    return json.loads((COMMITTED / name).read_text(encoding="utf-8"))


FILES = {
    "bench": result(quiet(0.5), quiet(1.0)),
    "model": load("h100/model-8b-32768x1.json"),
    "losses": load("cpu/fidelity-smollm2-135m-4096.json"),
    "pass keys": load("h200/fidelity-smollm2-135m-instruct-needle.json"),
    "original": ORIGINAL,
    "gguf": GGUF,
    "run": run_result(stock=15.0, speedup=INTERVAL),
}
# Texts that end outside of their chart.
OVER_THE_EDGE = """[...document.querySelectorAll('figure svg')].flatMap(svg => {
  const edges = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(text => {
    const box = text.getBoundingClientRect();
    return box.right > edges.right + 3 || box.left < edges.left - 3;
  }).map(text => text.textContent);
})"""
SVG = re.compile(r"<svg\b.*?</svg>", re.DOTALL)


@pytest.mark.parametrize("name", FILES)
@settings(tried(3), phases=(Phase.explicit, Phase.generate))  # a page takes a second: no shrinking
@given(random=st.randoms(use_true_random=False))
def test_any_text_of_a_file_leaves_the_page_well_formed(name, random):
    check(report(hostile(FILES[name], partial(any_text, random)), title=any_text(random)))


@settings(tried(3), phases=(Phase.explicit, Phase.generate))
@given(random=st.randoms(use_true_random=False))
def test_any_text_of_a_sweep_leaves_the_page_well_formed(tmp_path_factory, random):
    text = partial(any_text, random)
    header = {"sweep": {"version": 1, "plan_hash": "h", "cells": 2, "axes": {"recipe": [text(), text()]}, "command": [text()]}}
    cell = {"cell": {"seq": 1024, "recipe": text()}, "status": "ok", "reason": None, **hostile(FILES["bench"], text)}
    refused = {"cell": {"seq": 2048, "recipe": text()}, "status": "refused", "reason": text()}
    check(report(write(tmp_path_factory.mktemp("hostile"), "a.jsonl", [header, cell, refused])))


def check(made):
    """Check that a page, its charts and its Markdown are well-formed and hold nothing but text."""
    for svg in made.figures.values():
        ElementTree.fromstring(svg.encode("utf-8"))
    for html in (made.html, made._repr_html_()):
        Page(html)
        assert not NOT_TEXT.search(html)
        assert len(SVG.findall(html)) == len(made.figures)
        for svg in SVG.findall(html):
            ElementTree.fromstring(svg)
    assert not NOT_TEXT.search(made.markdown)
    for lines in re.findall(r"(?:^\|.*\n)+", made.markdown, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines.splitlines()}) == 1


@pytest.mark.parametrize(
    "text", ["GPU \\1 \\g<0> \\q", "C:\\new\\x41", "<svg> & \"'", "\x00\x0b\x1b\ud800\ufffe", '#1b1f24 id="a" url(#b)']
)
def test_a_chart_describes_a_device_of_any_name(text):
    value = FILES["bench"] | {"gpu": FILES["bench"]["gpu"] | {"name": text}}
    label = ElementTree.fromstring(report(value).figures["speedup-1"]).attrib["aria-label"]
    assert re.sub(r"[^ -~]", " ", text) in label


def test_a_page_says_the_same_of_a_device_as_its_charts():
    value = FILES["bench"] | {"gpu": FILES["bench"]["gpu"] | {"name": "GPU #1b1f24"}}
    labels = [text for tag, name, text in Page(report(value).html).attributes if (tag, name) == ("svg", "aria-label")]
    assert any("on GPU #1b1f24" in label for label in labels)


@given(st.text())
@example("深" * 100)
@example("_" + "x" * 10_000)
@example("\ud800\x00" * 50)
def test_a_label_of_a_chart_is_short_and_printable(text):
    label = shown(text)
    assert len(label) <= 65
    assert not NOT_TEXT.search(label)
    assert not label.startswith("_")
    if text.isascii() and text.isprintable() and len(text) <= 64:
        assert label.lstrip("\u200b") == text


def test_a_wide_label_takes_no_more_room_than_a_narrow_one():
    assert shown("深" * 100) == "深" * 31 + "…"
    assert shown("x" * 100) == "x" * 63 + "…"


def test_a_picture_of_endless_names_is_drawn(tmp_path: Path):
    value = hostile(FILES["bench"], lambda: "\ud800$x^2$ " + "x" * 10_000)
    path = tmp_path / "a.png"
    report(value).save(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_samples_of_any_contender_are_csv_that_computes_nothing():
    value = hostile(FILES["bench"], lambda: '=cmd|\x1b[2J"\n,')
    from elastickv.html_report.downloads import downloads

    files = {file.name: gzip.decompress(file.content).decode() for file in downloads(report(value).facts)}
    rows = list(csv.reader(io.StringIO(files["samples.csv.gz"])))
    assert {len(row) for row in rows} == {6}
    assert not any(cell.startswith("=") or NOT_TEXT.search(cell) for row in rows for cell in row)
    assert json.loads(files["results.jsonl.gz"]) == value


@pytest.mark.parametrize("text", ["x" * 600, "深" * 300], ids=["narrow", "wide"])
@pytest.mark.parametrize("name", ["bench", "losses", "pass keys", "run"])
def test_endless_names_run_over_no_edge(tmp_path, name, text):
    report(hostile(FILES[name], lambda: text), title=text).save(tmp_path / "a.html")
    with browser() as opened:
        for width in (360, 1280):
            with Visit(opened, tmp_path / "a.html", width) as visit:
                assert visit.ask("document.documentElement.scrollWidth") <= width
                assert visit.ask(OVER_THE_EDGE) == []
