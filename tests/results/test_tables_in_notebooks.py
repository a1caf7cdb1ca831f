"""The text of a result is its table wherever it is printed; left to itself, Rich draws into a notebook instead."""

from pathlib import Path

import pytest
from rich import console

import elastickv
from elastickv.results.compare.comparison_table import as_terminal

SHORT = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu" / "short.json"


@pytest.fixture(params=["notebook", "forced terminal"])
def elsewhere(request, monkeypatch):
    if request.param == "notebook":
        monkeypatch.setattr(console, "_is_jupyter", lambda: True)
    else:
        monkeypatch.setenv("FORCE_COLOR", "1")


def test_a_result_prints_its_table(elsewhere, capsys):
    text = str(elastickv.load(SHORT))
    assert "speed-up" in text and "\x1b" not in text and capsys.readouterr().out == ""


def test_a_comparison_prints_its_table(elsewhere, capsys):
    text = as_terminal(elastickv.compare(SHORT, SHORT))
    assert "verdict" in text and "\x1b" not in text and capsys.readouterr().out == ""
