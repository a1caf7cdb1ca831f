"""A sweep that lacks cells of its plan says so wherever it is read, and passes no gate."""

import json
import sys
from types import SimpleNamespace

import pytest

import elastickv
from elastickv import compare
from elastickv.errors import UsageError
from elastickv.results.kinds.sweep_record import SweepHeader
from elastickv.sweeps.journal import Journal, read
from elastickv.sweeps.plan import SweepPlan
from elastickv.sweeps.sweep_result import Sweep
from tests.helpers.results import quiet, result, write

CONTEXTS = [1024 * (1 + number) for number in range(30)]
AXES = {"seq": CONTEXTS, "compress": [2.0, 4.0]}


def header(**more):
    return {"sweep": {"version": 1, "plan_hash": "h", "cells": 60, "axes": AXES} | more}


def cells(count, seed=0):
    return [
        {"cell": {"seq": seq, "compress": 2.0}, "status": "ok", "reason": None}
        | result(quiet(0.5, seed + number), quiet(1.0, seed + 100 + number), seq=seq)
        for number, seq in enumerate(CONTEXTS[:count])
    ]


@pytest.fixture
def incomplete(tmp_path):
    """Four of sixty cells."""
    return write(tmp_path, "four.jsonl", [header(), *cells(4)])


@pytest.fixture
def elastickv_command(monkeypatch, capsys):
    """Run the program in this process."""
    from elastickv.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["elastickv", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        return SimpleNamespace(returncode=stop.value.code, stdout=shown.out, stderr=shown.err)

    return run


@pytest.fixture
def whole(tmp_path):
    return write(tmp_path, "whole.jsonl", [header(cells=4, axes={"seq": CONTEXTS[:4], "compress": [2.0]}), *cells(4, 50)])


def test_a_gate_on_an_incomplete_sweep_is_inconclusive_on_either_side(incomplete, whole):
    for a, b in ((whole, incomplete), (incomplete, whole), (incomplete, incomplete)):
        comparison = compare(a, b, margin_percent=50)
        for fail_on in ("slower", "fidelity", "any"):
            assert comparison.outcome(fail_on) == "inconclusive" and comparison.exit_code(fail_on) == 3
        assert comparison.exit_code(None) == 0
        (sentence,) = comparison.incomplete
        assert "four.jsonl is incomplete: it holds 4 of 60 planned cells; missing: seq=1024 compress=4" in sentence
        assert sentence in comparison.warnings
        assert len(comparison.missing) == 56
    assert compare(whole, whole, margin_percent=50).exit_code("any") == 0


def test_a_regression_in_what_is_there_stays_one(incomplete, tmp_path):
    slow = [record | result(quiet(0.9, 7), quiet(1.0, 8), seq=record["cell"]["seq"]) for record in cells(4)]
    path = write(tmp_path, "slow.jsonl", [header(), *slow])
    assert compare(incomplete, path).exit_code("slower") == 1


def test_the_command_says_it_and_exits_3(elastickv_command, incomplete, whole):
    done = elastickv_command("compare", whole, incomplete, "--fail-on", "any", "--margin", "50")
    assert done.returncode == 3
    assert "it holds 4 of 60 planned cells" in done.stdout
    done = elastickv_command("compare", whole, incomplete, "--fail-on", "any", "--margin", "50", "--format", "csv")
    assert done.returncode == 3 and "it holds 4 of 60 planned cells" in done.stderr


def test_a_report_counts_and_names_the_missing_cells(incomplete):
    pytest.importorskip("matplotlib")
    from tests.helpers.pages import Page

    made = elastickv.report(incomplete)
    page = Page(made.html)
    assert "four.jsonl is incomplete: it holds 4 of 60 planned cells" in page.text
    assert sum(row[:1] == ["missing"] for row in page.rows) == 56
    assert ["missing", "seq=30720 compress=4", "not measured: the sweep ended before it"] in page.rows
    told = json.loads(made.to_json())
    assert len(told["not_measured"]) == 56 and told["incomplete"]
    assert "60 planned cells" in made.markdown


def test_python_and_every_export_count_and_name_them(incomplete, tmp_path):
    with pytest.warns(UserWarning, match="it holds 4 of 60 planned cells; missing: seq=1024 compress=4"):
        loaded = elastickv.load(incomplete)
    assert not loaded.complete and loaded.missing.count == 56
    assert {"seq": 2048, "compress": 4.0} in loaded.missing.cells
    rows = loaded.rows()
    assert len(rows) == 60 and [row["status"] for row in rows].count("missing") == 56
    assert loaded.to_csv().count("missing") >= 56
    assert "it holds 4 of 60 planned cells" in loaded.to_markdown() and "it holds 4 of 60" in loaded._repr_html_()
    assert len(json.loads(loaded.to_json())["missing"]) == 56
    loaded.save(tmp_path / "again.json")
    assert Sweep.load(tmp_path / "again.json") == loaded
    assert compare(tmp_path / "again.json", incomplete, margin_percent=50).exit_code("any") == 3
    assert compare(loaded, incomplete, margin_percent=50).exit_code("any") == 3


def test_a_cell_whose_line_was_cut_off_is_missing(incomplete):
    incomplete.write_bytes(incomplete.read_bytes()[:-100])
    comparison = compare(incomplete, incomplete, margin_percent=50)
    assert "3 of 60 planned cells" in comparison.incomplete[0] and comparison.exit_code("any") == 3
    assert any("was cut off while it was written" in warning for warning in comparison.warnings)
    assert Sweep.load(incomplete).missing.count == 57


def test_a_cell_of_no_plan_is_not_among_the_planned_that_are_held(tmp_path):
    path = write(tmp_path, "s.jsonl", [header(cells=4, axes={"seq": CONTEXTS[1:5], "compress": [2.0]}), *cells(4)])
    (sentence,) = compare(path, path, margin_percent=50).incomplete
    assert f"it holds 3 of 4 planned cells; missing: seq={CONTEXTS[4]} compress=2" in sentence


def test_a_cell_that_has_no_name_is_counted(tmp_path):
    path = write(tmp_path, "s.jsonl", [header(axes={"seq": CONTEXTS}, cells=31), *cells(4)])
    comparison = compare(path, path, margin_percent=50)
    assert "holds 4 of 31 planned cells; missing: which ones its header does not say" in comparison.incomplete[0]
    assert comparison.exit_code("any") == 3
    assert Sweep.load(path).rows()[-1]["reason"] == "27 cells are missing; which ones its header does not say"


@pytest.mark.parametrize("status", ["failed", "refused", "does not fit"])
def test_a_cell_that_was_tried_is_not_missing(tmp_path, status):
    tried = {"cell": {"seq": 2048, "compress": 2.0}, "status": status, "reason": "no luck"}
    lines = [header(cells=2, axes={"seq": [1024, 2048], "compress": [2.0]}), *cells(1), tried]
    path = write(tmp_path, "s.jsonl", lines)
    assert Sweep.load(path).complete
    assert not compare(path, path).incomplete


def test_a_cell_of_no_plan_takes_no_missing_ones_place(tmp_path):
    stranger = cells(1)[0] | {"cell": {"seq": 99, "compress": 2.0}}
    path = write(tmp_path, "s.jsonl", [header(cells=2, axes={"seq": [1024, 2048], "compress": [2.0]}), *cells(1), stranger])
    assert Sweep.load(path).missing.cells == [{"seq": 2048, "compress": 2.0}]
    assert compare(path, path, margin_percent=50).exit_code("any") == 3


def test_a_file_names_every_planned_cell_though_its_plan_is_no_product(tmp_path):
    plan = SweepPlan.of(
        {"compress": 1.2, "heads": 4, "cells": [{"seq": [512, 1024], "batch": "1-2"}, {"seq": 512, "batch": 8}]}
    )
    path = tmp_path / "s.jsonl"
    with Journal(path, plan, resume=False) as journal:
        journal.append({"cell": dict(plan.cells[0]), "status": "failed", "reason": "x"})
    missing = Sweep.load(path).missing
    assert missing.count == 4 and missing.cells == [dict(cell) for cell in plan.cells[1:]]


def test_a_header_that_says_nothing_claims_nothing():
    assert SweepHeader().missing([{"seq": 1}]).count == 0
    assert SweepHeader(cells=2, axes={}).missing([]).count == 2


SMALL = {"seq": [512, 1024], "compress": 1.2, "heads": 2, "backend": "cpu"}


def resumable(path):
    plan = SweepPlan.of(SMALL)
    with Journal(path, plan, resume=False) as journal:
        journal.append({"cell": dict(plan.cells[0]), "status": "ok", "reason": None, "configuration": {"heads": 2}})
    return plan


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda head, cell: head.update(cells=60), "its cells are not those of the plan"),
        (lambda head, cell: head["axes"].update(seq=[512, 4096]), "its axes are not those of the plan"),
        (lambda head, cell: head["axes"].update(heads=[8]), "its axes are not those of the plan"),
        (lambda head, cell: head["settings"].update(backend="cuda"), "its settings are not those of the plan"),
        (lambda head, cell: head["planned"].pop(), "its planned are not those of the plan"),
        (lambda head, cell: head["planned"].reverse(), "its planned are not those of the plan"),
        (lambda head, cell: cell["cell"].update(seq=4096), "holds a cell that the plan does not have"),
        (lambda head, cell: cell["configuration"].update(heads=8), "heads=2 in its cell, heads=8 in its result"),
        (lambda head, cell: head.update(plan_hash="0" * 16), "holds another plan"),
    ],
)  # fmt: skip
def test_resume_computes_the_plan_anew_and_touches_no_file_that_contradicts_it(tmp_path, edit, said):
    path = tmp_path / "s.jsonl"
    plan = resumable(path)
    head, cell = map(json.loads, path.read_text().splitlines())
    edit(head["sweep"], cell)
    path.write_text(json.dumps(head) + "\n" + json.dumps(cell) + "\n")
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    with pytest.raises(UsageError, match=said) as error:
        Journal(path, plan, resume=True)
    assert "\n" not in str(error.value)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, stamp)


def test_a_header_of_an_older_version_is_resumed(tmp_path):
    path = tmp_path / "s.jsonl"
    plan = resumable(path)
    head, cell = map(json.loads, path.read_text().splitlines())
    del head["sweep"]["planned"]
    path.write_text(json.dumps(head) + "\n" + json.dumps(cell) + "\n")
    with Journal(path, plan, resume=True) as journal:
        assert len(journal.done) == 1
    assert len(read(path)[1]) == 1
