"""`elastickv report`: files, formats, and one line for what cannot be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import elastickv as elastickv_package
from tests.helpers.pages import Page
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
    assert done.returncode == 2
    assert f"error: {tmp_path / 'other.json'} holds no result" in done.stderr
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("none.json",), "none.json does not exist"),
        (("cut.json",), "cut.json is no JSON"),
        (("newer.json", "cut.json"), "newer.json is of schema 2.0"),
        (("newer.json", "cut.json"), "1 more files cannot be read"),
        (("empty.jsonl",), "empty.jsonl holds no result"),
        (("mixed.json",), "mixed.json mixes units"),
        (("good.json", "--format", "docx"), "--format docx is unknown"),
        (("good.json", "--format", "png"), "names html"),
        (("empty",), "empty holds no .json or .jsonl file"),
        ((), "Missing argument 'FILES...'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(elastickv, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    bad_files(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = elastickv("report", *arguments, "-o", "page.html")
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def bad_files(folder):
    """Write a good result and files that are none."""
    good = result(quiet(0.5), quiet(1.0))
    write(folder, "good.json", good)
    (folder / "cut.json").write_text(json.dumps(good)[:-100], encoding="utf-8")
    (folder / "binary.json").write_bytes(bytes(range(256)))
    (folder / "blank.json").write_text("", encoding="utf-8")
    write(folder, "foreign.json", {"name": "a package"})
    write(folder, "newer.json", good | {"schema_version": "2.0"})
    write(folder, "lacks.json", {key: value for key, value in good.items() if key != "roofline"})
    header = {"sweep": {"version": 1, "plan_hash": "h", "cells": 1, "axes": {}}}
    write(folder, "empty.jsonl", [header])
    mixed = result(quiet(0.5), quiet(1.0))
    mixed["results"]["attention_time_ms"] *= 1000
    write(folder, "mixed.json", mixed)
    (folder / "empty").mkdir()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("none.json", "none.json does not exist"),
        ("cut.json", "cut.json is no JSON"),
        ("binary.json", "binary.json is not UTF-8"),
        ("blank.json", "blank.json is empty"),
        ("foreign.json", "foreign.json holds no result"),
        ("newer.json", "newer.json is of schema 2.0"),
        ("lacks.json", "lacks.json lacks roofline"),
        ("empty.jsonl", "empty.jsonl holds no result: 0 of 1 planned cells are in it"),
        ("mixed.json", "mixed.json mixes units"),
        ("empty", "empty holds no .json or .jsonl file"),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_a_bad_file_beside_a_good_one_is_named_and_the_good_one_is_shown(elastickv, tmp_path, monkeypatch, bad, said, order):
    monkeypatch.chdir(tmp_path)
    bad_files(tmp_path)
    done = elastickv("report", *["good.json", bad][::order], "-o", "page.html")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if said in line and line.startswith("elastickv: error: ")]
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert said in page
    assert "1024 tokens" in page


def test_a_folder_of_good_and_bad_files_shows_the_good_one_and_names_every_other(elastickv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad_files(tmp_path)
    (tmp_path / "good.json").rename(tmp_path / "empty" / "good.json")
    done = elastickv("report", ".", "-o", "page.html")
    assert done.returncode == 2
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8")).text
    for name in (
        "cut.json",
        "binary.json",
        "blank.json",
        "foreign.json",
        "newer.json",
        "lacks.json",
        "mixed.json",
        "empty.jsonl",
    ):
        assert name in page
        assert [line for line in done.stderr.splitlines() if line.startswith(f"elastickv: error: {name} ")]
    assert "1024 tokens" in page


@pytest.mark.parametrize("arguments", [("unfit.jsonl",), ("good.json", "unfit.jsonl"), (".",)], ids=" ".join)
def test_cells_that_failed_are_shown_wherever_their_file_lies(elastickv, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    header = {"sweep": {"version": 1, "plan_hash": "h", "cells": 2, "axes": {"seq": [1, 2]}}}
    cells = [
        {"cell": {"seq": 1}, "status": "does not fit", "reason": "too small"},
        {"cell": {"seq": 2}, "status": "failed", "reason": "out of luck"},
    ]
    write(tmp_path, "unfit.jsonl", [header, *cells])
    if arguments != ("unfit.jsonl",):
        write(tmp_path, "good.json", result(quiet(0.5), quiet(1.0)))
    done = elastickv("report", *arguments, "-o", "page.html")
    assert (done.returncode, done.stderr) == (0, "")
    rows = Page((tmp_path / "page.html").read_text(encoding="utf-8")).rows
    assert ["does not fit", "seq=1", "too small"] in rows
    assert ["failed", "seq=2", "out of luck"] in rows


@pytest.mark.parametrize("bad", ["cut.json", "unfit.jsonl"])
def test_an_input_is_never_overwritten_though_nothing_of_it_is_shown(elastickv, tmp_path, monkeypatch, bad):
    monkeypatch.chdir(tmp_path)
    bad_files(tmp_path)
    header = {"sweep": {"version": 1, "plan_hash": "h", "cells": 1, "axes": {"seq": [1]}}}
    write(tmp_path, "unfit.jsonl", [header, {"cell": {"seq": 1}, "status": "failed", "reason": "small"}])
    before = (tmp_path / bad).read_bytes()
    done = elastickv("report", "good.json", bad, "-o", bad, "--format", "html")
    assert done.returncode == 2 and "is one of the results" in done.stderr
    assert (tmp_path / bad).read_bytes() == before


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
