"""What no input may do: run code, name a file to write, reach the network, hold the program up, or steer the terminal."""

import ast
import csv
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from elastickv.benchmark.sample_inputs import load_sample
from elastickv.errors import MAX_CHARACTERS, UsageError, one_line, printable
from elastickv.evaluation.texts import read_text
from elastickv.inputs import MAX_DEPTH, parse_json, read_bytes
from elastickv.recipe import ModelCalibration
from elastickv.results.compare.comparison import compare
from elastickv.results.compare.comparison_table import FORMATS
from elastickv.results.compare.result_sets import read_result_set
from elastickv.results.formats.rows import csv_of
from elastickv.sweeps.plan import read_plan
from elastickv.sweeps.sweep_result import Sweep
from tests.helpers.results import ORIGINAL, result, write

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("src", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
# Modules that run code from data, or fetch from elsewhere.
FORBIDDEN_MODULES = {
    *("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "code", "codeop"),
    *("tarfile", "zipfile", "shutil.unpack_archive", "urllib", "urllib3", "requests", "httpx", "aiohttp", "http", "ftplib"),
    *("socket", "ssl", "smtplib", "telnetlib", "xmlrpc", "webbrowser", "asyncio"),
}
# What needs one all the same.
ALLOWED = {
    (
        "src/elastickv/backends/cpu/numba_cache.py",
        "pickle",
    ): "Numba's own form of compiled code; who may have written it is checked",
    ("src/elastickv/model_benchmark/llama_cpp.py", "urllib"): "llama.cpp's server in this process, on the loopback address",
    ("tools/package.py", "tarfile"): "lists what it has just built",
    ("tools/package.py", "zipfile"): "lists what it has just built",
    ("tools/run_notebook.py", "exec"): "runs the notebook that the user names",
    ("tools/run_notebook.py", "eval"): "runs the notebook that the user names",
    ("tools/run_notebook.py", "compile"): "runs the notebook that the user names",
}
HARMLESS = {"urllib.parse"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "execfile", "system", "popen", "unpack_archive"}
READERS = {
    "compare": lambda path: read_result_set(path, "A"),
    "sweep": Sweep.load,
    "plan": read_plan,
    "calibration": ModelCalibration.load,
    "text": read_text,
    "activations": load_sample,
}


def called(node):
    """Return the name of what is called, and whether it is a function by itself: `model.eval()` is none."""
    function = node.func
    if isinstance(function, ast.Name):
        return function.id, True
    return (function.attr, False) if isinstance(function, ast.Attribute) else ("", False)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_comes_from_data(path):
    allowed = {what for file, what in ALLOWED if file == path.relative_to(ROOT).as_posix()}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            used = {name.split(".")[0] for name in names if name not in HARMLESS}
            assert not used & FORBIDDEN_MODULES - allowed, f"line {node.lineno}"
        elif isinstance(node, ast.Call):
            name, alone = called(node)
            # A method called eval, compile or system of somebody's own object is none of these.
            owner = node.func.value.id if not alone and isinstance(getattr(node.func, "value", None), ast.Name) else None
            assert not (name in FORBIDDEN_CALLS - allowed and (alone or owner in ("os", "builtins", "shutil"))), (
                f"line {node.lineno}: {name}"
            )
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            assert not (owner == "torch" and name == "load"), f"line {node.lineno}: torch.load"
            for flag in ("allow_pickle", "shell", "trust_remote_code"):
                said = given.get(flag)
                assert said is None or (isinstance(said, ast.Constant) and said.value is False), f"line {node.lineno}: {flag}"


@pytest.fixture
def odd_files(tmp_path):
    """Return what stands where a file should: each would hang, exhaust memory or fail a careless reader."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zeros.json").symlink_to("/dev/zero")
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "nowhere.json").symlink_to("gone")
    with (tmp_path / "sparse.json").open("wb") as file:
        file.truncate(10 << 30)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "binary.json").write_bytes(b"\x80\x04\x95" + bytes(range(256)))
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(tmp_path / "socket.json"))
    yield tmp_path
    server.close()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["pipe", "zeros", "loop", "nowhere", "sparse", "folder", "binary", "socket"])
def test_what_is_no_file_is_refused_at_once(odd_files, reader, name):
    with pytest.raises(UsageError) as refused:
        READERS[reader](odd_files / f"{name}.json")
    assert f"{name}.json" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_no_file_of_more_than_is_accepted_is_read(odd_files):
    before = _peak()
    with pytest.raises(UsageError, match="larger than 256 MiB"):
        read_bytes(odd_files / "sparse.json", "it", "do")
    with pytest.raises(UsageError, match="not a regular file"):
        read_bytes(odd_files / "zeros.json", "it", "do")
    assert _peak() - before < 1 << 16  # KiB


def _peak():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "deep"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "deep"),
        ('{"a":' * 70 + "1" + "}" * 70, "deep"),
        ("1e999", "no figure"),
        ("-1e999", "no figure"),
        ("[NaN]", "NaN, which is no figure"),
        ("9" * 5000, "no figure"),
        ("1" + "0" * 400, "no figure"),
        ('[{"a": 1, "b": 2, "a": 1}]', "it holds 'a' twice"),
        ('{"a": 1', "line 1, column 8"),
        ("", "line 1, column 1"),
    ],
)
def test_json_that_would_break_what_follows_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        parse_json(text)


def test_json_of_every_kind_is_read():
    value = {"a": [1, -2.5, "é", None, True, {"b": []}], "n": 10**18}
    assert parse_json(json.dumps(value)) == value
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) == json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)


def test_messages_are_one_printable_line_of_bounded_length():
    said = str(UsageError("a\nb\x1b[31m\t\u202e\ud800" + "x" * 10_000))
    assert said.startswith("a b\\x1b[31m \\u202e\\ud800xx")
    assert len(said) < MAX_CHARACTERS + 10
    assert one_line("plain text") == "plain text"
    assert printable("two\nlines, é") == "two\nlines, é"


MARKUP = "[bold]x[/] [/] \x1b[2J\x1b]0;title\x07 <script>alert(1)</script> a|b [l](javascript:x) \u202e\ud800"


def computed():
    """Return texts that a spreadsheet would compute."""
    return ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1"]


def test_a_spreadsheet_computes_nothing_of_a_file():
    shown = csv_of([{"=cmd": text, "number": -1.5} for text in computed()])
    cells = list(csv.reader(shown.splitlines()))
    assert all(cell.startswith("'") for cell, _ in cells)
    assert {number for _, number in cells[1:]} == {"-1.5"}


def hostile():
    """Return a result of the original program, every text of which would do something if it were not shown as it is."""
    value = json.loads(json.dumps(ORIGINAL))
    value["gpu"]["name"] = MARKUP
    return value


@pytest.mark.parametrize("form", FORMATS)
def test_texts_of_a_result_are_shown_as_text(tmp_path, form):
    a, b = write(tmp_path, "a.json", hostile()), write(tmp_path, "b.json", hostile() | {"brand": "another"})
    cell = {"cell": {MARKUP: MARKUP}, "status": "failed", "reason": MARKUP}
    both = write(tmp_path, "c.jsonl", [cell, hostile()])
    for before, after in ((a, b), (both, b)):
        shown = FORMATS[form](compare(before, after))
        assert not any(c in shown for c in "\x1b\x07\u202e\ud800")
        shown.encode()
        if form == "html":
            assert "<script>" not in shown
        if form == "md":
            assert not re.search(r"(?<!\\)<script|\]\(", shown)
            assert not any(line.count(" | ") > 20 for line in shown.splitlines())


def test_an_error_that_quotes_a_file_steers_no_terminal(tmp_path):
    path = write(tmp_path, "a.json", hostile() | {"configuration": {"seq_len": MARKUP}})
    with pytest.raises(UsageError) as refused:
        read_result_set(path, "A")
    assert str(refused.value).isprintable()


def _sweep(tmp_path):
    head = {"version": 1, "plan_hash": "0" * 16, "cells": 2, "axes": {"seq": [1, 2], "recipe": [MARKUP]}}
    cells = [
        {"cell": {"seq": 1, "recipe": MARKUP}, "status": "failed", "reason": MARKUP},
        {"cell": {"seq": 2, "recipe": MARKUP}, "status": "ok", "reason": None} | result(),
    ]
    cells[1]["gpu"]["name"] = MARKUP
    return Sweep.load(write(tmp_path, "s.jsonl", [{"sweep": head}, *cells]))


def test_a_notebook_shows_the_texts_of_a_sweep_as_text(tmp_path):
    found = _sweep(tmp_path)
    shown = found._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    for text in (shown, found.to_markdown(), found.to_csv()):
        assert "\x1b" not in text
        text.encode()
    assert json.loads(found.to_json())["cells"][0]["reason"] == MARKUP, "a file for programs keeps what was written"


def test_names_in_files_name_no_files(tmp_path, monkeypatch):
    """Whatever a file calls its model, text, cell or tensor: what is written is what the user named, and nothing else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    up = "../escaped"
    head = {"version": 1, "plan_hash": up, "cells": 1, "axes": {"seq": [up]}, "settings": {"input": up}}
    sweep = Sweep.load(write(tmp_path, "s.jsonl", [{"sweep": head}, {"cell": {"seq": up}, "status": "failed", "reason": up}]))
    sweep.save(tmp_path / "deep" / "out.csv")
    value = json.loads(json.dumps(ORIGINAL))
    value["gpu"]["name"] = up
    path = write(tmp_path, "a.json", value)
    FORMATS["md"](compare(path, path))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.json", "deep", "out.csv", "s.jsonl"]


_NO_NETWORK = """
import socket, sys
real = socket.socket
class Closed(real):
    def __init__(self, family=-1, *rest, **named):
        if family not in (socket.AF_UNIX,):
            sys.stderr.write("NETWORK\\n")
            raise OSError("no network")
        super().__init__(family, *rest, **named)
socket.socket = Closed
def refused(*_, **__):
    sys.stderr.write("NETWORK\\n")
    raise OSError("no network")
socket.getaddrinfo = socket.create_connection = socket.gethostbyname = refused
from elastickv.cli import main
sys.argv = ["elastickv", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("bench --seq 512 --heads 2 --reps 2 --warmup 0 --inner-loops 1 --recipe int8 --backend cpu --cache hot", 0),
        ("compare {a} {a} --format json", 0),
        ("sweep -o {out} --seq 512 --heads 2 --recipe stride=99", 2),
        ("eval {missing}.gguf", 2),
        ("calibrate {folder}", 2),
    ],
)
def test_nothing_reaches_for_the_network(tmp_path, arguments, code):
    places = {
        "a": write(tmp_path, "a.json", result()),
        "out": tmp_path / "o.jsonl",
        "missing": tmp_path / "m",
        "folder": tmp_path,
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", _NO_NETWORK, *arguments.format(**places).split()],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert "NETWORK" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == code, done.stderr
