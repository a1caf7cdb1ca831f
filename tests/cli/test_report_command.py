"""`elastickv report`: files, formats, and one line for what cannot be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import elastickv as elastickv_package
from tests.helpers.results import COMMITTED, quiet, result, write

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

SHORT = COMMITTED / "cpu" / "short.json"


def test_the_page_is_written_and_its_headline_printed(elastickv, tmp_path):
    done = elastickv("report", SHORT, COMMITTED / "h100" / "long.json", "-o", tmp_path / "page.html", "--title", "A & B")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'page.html'}: On NVIDIA H100 80GB HBM3, 4096 tokens")
    speedup = json.loads((COMMITTED / "h100" / "long.json").read_text(encoding="utf-8"))["speedup"]
    assert "{estimate:.3f} [{low:.3f}, {high:.3f}]".format(**speedup) in done.stdout
    assert "<title>A &amp; B</title>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(("shown", "name"), [("html", "report.html"), ("md", "report.md"), ("png", "report.png")])
def test_without_a_name_it_is_written_here(elastickv, tmp_path, monkeypatch, shown, name):
    monkeypatch.chdir(tmp_path)
    assert elastickv("report", SHORT, "--format", shown).returncode == 0
    assert (tmp_path / name).stat().st_size > 1000


def test_what_is_no_result_in_a_folder_is_named(elastickv, tmp_path):
    write(tmp_path, "a.json", result(quiet(0.5), quiet(1.0)))
    write(tmp_path, "other.json", {"a": 1})
    done = elastickv("report", tmp_path, "-o", tmp_path / "page.html")
    assert done.returncode == 0
    assert f"warning: not shown, being no results: {tmp_path / 'other.json'}" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("none.json",), "none.json does not exist"),
        (("cut.json",), "cut.json is no JSON"),
        (("good.json", "cut.json"), "cut.json is no JSON"),
        (("good.json", "newer.json"), "newer.json is of schema 2.0"),
        (("good.json", "empty.jsonl"), "empty.jsonl holds no result"),
        (("unfit.jsonl",), "unfit.jsonl holds 1 cells, none of them measured"),
        (("good.json", "mixed.json"), "mixed.json mixes units"),
        (("good.json", "--format", "docx"), "--format docx is unknown"),
        (("good.json", "--format", "png"), "names html"),
        (("empty",), "empty holds no .json or .jsonl file"),
        ((), "Missing argument 'FILES...'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(elastickv, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    good = result(quiet(0.5), quiet(1.0))
    write(tmp_path, "good.json", good)
    (tmp_path / "cut.json").write_text(json.dumps(good)[:-100], encoding="utf-8")
    write(tmp_path, "newer.json", good | {"schema_version": "2.0"})
    header = {"sweep": {"version": 1, "plan_hash": "h", "cells": 1, "axes": {}}}
    write(tmp_path, "empty.jsonl", [header])
    write(tmp_path, "unfit.jsonl", [header, {"cell": {"seq": 1}, "status": "does not fit", "reason": "small"}])
    mixed = result(quiet(0.5), quiet(1.0))
    mixed["results"]["attention_time_ms"] *= 1000
    write(tmp_path, "mixed.json", mixed)
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    done = elastickv("report", *arguments, "-o", "page.html")
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("output", ["none/page.html", ".", "page.pdf", "good.json"])
def test_a_page_that_cannot_be_written_is_refused(elastickv, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "good.json", result(quiet(0.5), quiet(1.0)))
    before = path.read_bytes()
    done = elastickv("report", "good.json", "-o", output)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["good.json"]


def test_importing_the_package_draws_nothing():
    code = "import sys, elastickv; elastickv.report; assert not {'matplotlib', 'jinja2'} & set(sys.modules)"
    path = {"PYTHONPATH": str(Path(elastickv_package.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | path, check=False).returncode == 0
