"""The docs compare methods at equal bytes only where there is something to compare."""

import importlib
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWN_RECIPES = ROOT / "benchmarks" / "results" / "cpu" / "fidelity-smollm2-135m-4096.json"


@pytest.fixture
def figures(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    module = importlib.import_module("frontier_figures")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    (tmp_path / "cpu").mkdir()
    return module


def test_a_result_of_our_recipes_alone_has_no_section_and_no_picture(figures, tmp_path):
    shutil.copy(OWN_RECIPES, tmp_path / "cpu" / "frontier-smollm2-4096.json")
    assert list(figures.measured("*/frontier-*.json")) == [("SmolLM2-135M-Instruct.Q4_1.gguf", 4096, "")]
    assert figures.frontier() == [] and list(figures.pictures()) == []
