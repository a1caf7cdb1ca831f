"""The study of the first page: one cell for each format, window and variant, compared token by token."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny_models import tiny_gguf

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "first_page.py"
SOURCE = SCRIPT.parents[1] / "src"


@pytest.fixture
def run(tmp_path):
    pytest.importorskip("transformers")

    def call(*arguments):
        output = tmp_path / "first_page.json"
        command = [sys.executable, str(SCRIPT), f"--model={tiny_gguf(tmp_path / 'tiny.gguf')}", f"--output={output}"]
        environment = os.environ | {"PYTHONPATH": str(SOURCE)}
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=environment), output

    return call


def test_every_variant_of_the_first_page_is_scored_on_the_same_tokens(run, tmp_path):
    done, output = run("--windows=2", "--tokens=384", "--formats=int4,int8")
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert record["model"] == "tiny.gguf" and str(tmp_path) not in json.dumps(record)
    assert len(record["windows"]) == 2 and record["scored_tokens_of_a_window"] == 192
    cells = {(cell["format"], cell["exact_tokens"], cell["first_page"]): cell for cell in record["cells"]}
    of_int4 = {(window, page) for name, window, page in cells if name == "int4"}
    pages = {"as all pages", "int8", "int8 keys", "exact", "first four tokens exact"}
    assert of_int4 == {(window, page) for window in (128, 64) for page in pages}
    assert {key[2] for key in cells if key[0] == "int8"} == pages - {"int8", "int8 keys"}
    assert len({cell["full_ppl"] for cell in cells.values()}) == 1
    for (name, window, page), cell in cells.items():
        base = cells[name, window, "as all pages"]
        assert cell["kl"]["mean"] > 0 and len(cell["kl_of_windows"]) == 2
        if page != "as all pages":
            saved = base["kl"]["mean"] - cell["kl"]["mean"]
            assert cell["kl_saved"]["mean"] == pytest.approx(saved, rel=1e-6, abs=1e-12)
            assert cell["kl_saved"]["low"] <= cell["kl_saved"]["mean"] <= cell["kl_saved"]["high"]


@pytest.mark.parametrize("argument", ["--formats=int2", "--tokens=100"])
def test_a_format_or_length_that_is_none_is_refused(run, argument):
    done, output = run(argument)
    assert done.returncode == 2 and "--formats are" in done.stderr and not output.exists()
