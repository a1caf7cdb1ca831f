"""The notebook: its two files are one, it runs from top to bottom, and its results and outputs are what it says."""

import json
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from elastickv.results.compare.result_sets import read_result_set
from tests.helpers.tiny_models import tiny_gguf

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "elastickv_quickstart.ipynb"
SCRIPT = NOTEBOOK.with_suffix(".py")
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_script_and_notebook_are_in_step():
    jupytext = pytest.importorskip("jupytext")
    script = jupytext.read(SCRIPT)
    told = [(cell["cell_type"], "".join(cell["source"])) for cell in CELLS]
    assert told == [(cell.cell_type, cell.source) for cell in script.cells], f"run: jupytext --to ipynb --update {SCRIPT.name}"
    assert script.metadata["jupytext"]["formats"] == "ipynb,py:percent"


def test_outputs_are_stripped():
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_badge_opens_the_notebook_of_the_address():
    text = SCRIPT.read_text(encoding="utf-8")
    [address] = re.findall(r'"https://github\.com/([\w.-]+/[\w.-]+)"', text)
    assert f"](https://colab.research.google.com/github/{address}/blob/main/notebooks/{NOTEBOOK.name})" in text


def test_what_runs_by_itself_is_what_the_text_says():
    text = SCRIPT.read_text(encoding="utf-8")
    assert '"ELASTICKV_TRANSFORMERS", "1"' in text and '"ELASTICKV_GGUF", "0"' in text
    assert len(re.findall(r'"-m", "pip", "install"', text)) == 1


def outputs(notebook, title):
    """Return what the code cells of a section gave: text printed, and HTML shown."""
    cells = iter(notebook["cells"])
    for cell in cells:
        if cell["cell_type"] == "markdown" and f"## {title}" in cell["source"]:
            break
    printed, html = "", ""
    for cell in cells:
        if cell["cell_type"] == "markdown":
            break
        for output in cell["outputs"]:
            printed += "".join(output.get("text", ""))
            html += "".join(output.get("data", {}).get("text/html", ""))
    return printed, html


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after a quick run in a kernel of its own, both baselines on, and the folder of its results."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for package in ("ipykernel", "xllamacpp", "jinja2", "matplotlib"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("notebook")
    model = str(tiny_gguf(folder / "tiny.gguf"))
    environment = {"QUICK": "1", "MODEL": model, "GGUF": "1", "GGUF_MODEL": model, "RESULTS": str(folder / "results")}
    environment = {f"ELASTICKV_{name}": value for name, value in environment.items()} | {"PYTHONPATH": str(ROOT / "src")}
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}})
    client.execute(env=os.environ | environment)
    return notebook, folder / "results"


def test_every_result_is_written_and_is_one(executed):
    _, results = executed
    assert sorted(path.name for path in results.iterdir()) == [
        "decode_pages.cu", "gguf.json", "long.json", "report.html", "short.json", "transformers.json",
    ]  # fmt: skip
    runs = {Path(run.source).stem: run for run in read_result_set(results, "A").runs}
    assert set(runs) == {"gguf", "long", "short", "transformers"}
    assert dict(runs["long"].cell.workload)["seq"] == 4096 and dict(runs["short"].cell.workload)["seq"] == 1024
    assert runs["transformers"].fidelity.mean > 0


def test_the_source_is_written_and_shown(executed):
    notebook, results = executed
    printed, html = outputs(notebook, "The CUDA source, written")
    source = (results / "decode_pages.cu").read_text(encoding="utf-8")
    assert f"decode_pages.cu: {len(source.splitlines())} lines" in printed
    assert "__global__" in html and unescape(html).count(source) == 1


def test_the_written_source_is_compiled_where_there_is_a_compiler(executed):
    printed, html = outputs(executed[0], "The CUDA source, compiled")
    compiled = "decode_pages.cu for compute capability" in printed and "registers" in html
    assert compiled or "not compiled, and not needed to go on" in printed


def test_each_preset_and_its_json_are_steps_of_their_own(executed):
    notebook, results = executed
    for name, context in (("long", 4096), ("short", 1024)):
        printed, _ = outputs(notebook, f"The {name} preset")
        assert f"context {context}" in printed and "speed-up" in printed
    printed, _ = outputs(notebook, "A result as JSON")
    speedup = json.loads((results / "long.json").read_text())["speedup"]
    assert '"speedup": {' in printed and f'"low": {speedup["low"]}' in printed


def test_every_code_cell_shows_something(executed):
    silent = [cell["source"] for cell in executed[0]["cells"] if cell["cell_type"] == "code" and not cell["outputs"]]
    assert silent == []


def test_tables_and_plots_are_of_the_results(executed):
    notebook, results = executed
    _, table = outputs(notebook, "Every result in one table")
    assert "long.json" in table and "short.json" in table and table.count("<tr>") >= 3
    _, plots = outputs(notebook, "The report")
    assert plots.count("<svg") >= 2
    _, together = outputs(notebook, "Everything together")
    for name in ("long.json", "transformers.json", "gguf.json"):
        assert name in together
    assert "<svg" in together and (results / "report.html").stat().st_size > 20_000


def test_both_baselines_say_what_they_measured(executed):
    notebook, results = executed
    printed, _ = outputs(notebook, "Transformers mini baseline")
    assert "elastic / stock" in printed and "KL mean" in printed and "Instead" not in printed
    printed, html = outputs(notebook, "GGUF baseline")
    assert "decode, q4_0 / f16" in printed
    for name in ("llama.cpp f16", "llama.cpp q8_0", "llama.cpp q4_0", "ElasticKV int8", "ElasticKV int4"):
        assert name in html
    per_token = json.loads((results / "gguf.json").read_text())["caches"][0]["kv_bytes_per_token"]
    assert f"<td>{per_token:g}</td>" in html


SMALL = [
    {"cell_type": "markdown", "metadata": {}, "source": ["# A title"]},
    {"cell_type": "code", "metadata": {}, "source": ["print('said')\n", "x = 2\n", "x + 1"]},
    {
        "cell_type": "code",
        "metadata": {},
        "source": ["class Rich:\n    def _repr_html_(self):\n        return '<b>rich</b>'\nRich()"],
    },
]


def run_without_jupyter(tmp_path, *cells):
    path = tmp_path / "small.ipynb"
    path.write_text(json.dumps({"cells": [*SMALL, *cells], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    command = [sys.executable, str(ROOT / "tools" / "run_notebook.py"), str(path), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    notebook = json.loads((tmp_path / "out" / "small.ipynb").read_text())
    return done, notebook, (tmp_path / "out" / "small.html").read_text()


def test_the_runner_without_jupyter_writes_outputs_and_a_page(tmp_path):
    done, notebook, page = run_without_jupyter(tmp_path)
    assert done.returncode == 0 and "said" in done.stdout
    _, plain, rich = notebook["cells"]
    assert plain["outputs"][0] == {"output_type": "stream", "name": "stdout", "text": "said\n"}
    assert plain["outputs"][1]["data"] == {"text/plain": "3"} and plain["execution_count"] == 1
    assert rich["outputs"][0]["data"]["text/html"] == "<b>rich</b>"
    assert "<h1>A title</h1>" in page and "<b>rich</b>" in page


def test_the_runner_stops_at_a_cell_that_fails_and_keeps_what_there_is(tmp_path):
    bad = {"cell_type": "code", "metadata": {}, "source": ["1 / 0"], "outputs": []}
    done, notebook, page = run_without_jupyter(tmp_path, bad, {**bad, "source": ["print('never')"]})
    assert done.returncode == 1
    assert notebook["cells"][3]["outputs"][0]["ename"] == "ZeroDivisionError" and "ZeroDivisionError" in page
    assert "never" not in done.stdout and notebook["cells"][4]["outputs"] == []
