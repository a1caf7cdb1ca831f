"""Waiting is never silent: a bar with the time left on a terminal, lines at most every ten seconds elsewhere."""

import io

import pytest
from rich.console import Console

from elastickv.backends import load
from elastickv.backends.compilation_report import Interruption, current_report
from elastickv.backends.cpu import backend
from elastickv.cli.progress import Bar, TimeLeft
from elastickv.recipe import AttentionShape, Recipe


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def bar(terminal):
    out, clock = io.StringIO(), Clock()
    return Bar(Console(file=out, force_terminal=terminal, width=100), clock), out, clock


def test_the_time_left_comes_from_the_steps_done_and_counts_down_between_them():
    clock = Clock()
    left = TimeLeft(clock)
    assert left.seconds() is None and str(left) == "0 s so far"
    clock.now += 10
    left.update(1, 5)
    assert left.seconds() == 40
    clock.now += 4
    assert left.seconds() == 36 and str(left) == "36 s left"
    clock.now += 100
    assert left.seconds() == 0
    left.update(5, 5)
    assert str(left) == "1 min 54 s so far"


def test_cells_that_are_in_the_file_already_took_no_time():
    clock = Clock()
    left = TimeLeft(clock)
    left.begin(6)
    clock.now += 20
    left.update(8, 10)
    assert left.seconds() == 20


def test_a_count_that_falls_begins_anew():
    """The loader counts the tensors that it reads, then those that it places."""
    clock = Clock()
    left = TimeLeft(clock)
    clock.now += 300
    left.update(100, 100)
    left.update(0, 4)
    assert left.seconds() is None
    clock.now += 2
    left.update(1, 4)
    assert left.seconds() == 6


@pytest.mark.parametrize(("done", "shown"), [(None, ["0 s so far"]), (1, ["25 %", "30 s left"])])
def test_a_terminal_shows_the_phase_its_share_and_the_time_left(done, shown):
    progress, out, clock = bar(terminal=True)
    with progress:
        progress.phase("reading [the] prompt")
        if done:
            clock.now += 10
            progress.progress(done, 4)
        progress._progress.refresh()
    assert "reading [the] prompt" in out.getvalue()
    assert all(text in out.getvalue() for text in shown)


def test_elsewhere_there_is_a_line_for_each_phase_and_an_estimate_every_ten_seconds():
    progress, out, clock = bar(terminal=False)
    with progress:
        progress.phase("loading")
        progress.phase("calibrating")
        for step in range(1, 60):
            clock.now += 1
            progress.progress(step, 60)
    assert out.getvalue().splitlines() == [
        "elastickv: loading",
        "elastickv: calibrating",
        *(f"elastickv: calibrating: {step / 60:.0%}, {60 - step} s left" for step in (10, 20, 30, 40, 50)),
    ]


def test_what_a_command_prints_below_a_bar_goes_where_its_output_goes(capsys):
    progress, out, _ = bar(terminal=True)
    with progress:
        progress.phase("measuring")
        print("a result")
    assert capsys.readouterr().out == "a result\n" and "a result" not in out.getvalue()


def test_kernels_that_are_compiled_on_the_way_are_a_phase_of_their_own():
    shown, out, _ = bar(terminal=False)
    assert current_report() is None
    with shown:
        shown.phase("scoring")
        shown.progress(1, 8)
        current_report().phase("compiling")
        current_report().progress(0, 10)
        current_report().progress(10, 10)
        current_report().progress(10, 10)
        shown.progress(2, 8)
    assert current_report() is None
    assert out.getvalue().splitlines() == [f"elastickv: {name}" for name in ("scoring", "compiling", "scoring")]


def test_compilation_counts_for_nothing_in_the_time_left():
    """The first tokens of an evaluation on a fresh machine were said to be followed by half an hour."""
    shown, out, clock = bar(terminal=True)
    with shown:
        shown.phase("scoring")
        current_report().phase("compiling")
        clock.now += 30
        current_report().progress(10, 10)
        clock.now += 1
        shown.progress(1, 8)
    assert "7 s left" in out.getvalue() and "min" not in out.getvalue()


def test_every_cache_on_the_cpu_shows_what_it_compiles(monkeypatch):
    reports = []
    monkeypatch.setattr(backend, "compile_kernels", lambda kernels, report: reports.append(report))
    shown, _, _ = bar(terminal=False)
    with shown:
        load("cpu")[0].cache(AttentionShape(1, 1, 1, 64), 64, "bf16", Recipe.parse("int8"))
    assert isinstance(reports[0], Interruption)
