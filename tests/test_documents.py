"""What the documents say is what the files hold, and their examples run."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import click
import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WORKFLOWS = sorted((ROOT / "docs" / "workflows").glob("*.yml"))
RESULT = ROOT / "benchmarks" / "results" / "cpu" / "short.json"


@pytest.mark.parametrize("tool", ["render_figures", "render_reference"])
def test_what_a_tool_writes_is_up_to_date(tool):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{tool}.py"), "--check"],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert target.startswith("http") or (document.parent / target).exists(), target


def commands():
    """Yield (file, subcommand, the rest of the line) of everything that a document tells to type."""
    for path in (*DOCUMENTS, *WORKFLOWS):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        if path.suffix == ".md":
            text = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
        for name, rest in re.findall(
            r"^(?:.*[ /])?(elastickv (?!bench --model)[a-z]+|elastic_kv_cli)(?= |$)(.*)$", text, re.MULTILINE
        ):
            yield path, name.removeprefix("elastickv "), rest.partition(" #")[0]


def test_every_command_and_option_in_the_documents_exists():
    from elastickv.cli import elastic_kv_cli, root

    group = click.Context(root)
    seen = set()
    for path, name, rest in commands():
        command = elastic_kv_cli.command if name == "elastic_kv_cli" else root.get_command(group, name)
        assert command is not None, f"{path.name}: {name}"
        if isinstance(command, click.Group):
            inner, _, rest = rest.strip().partition(" ")
            command = command.get_command(click.Context(command), inner)
            assert command is not None, f"{path.name}: {name} {inner}"
        known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
        assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest.partition("|")[0])) <= known, f"{path.name}: {name}{rest}"
        seen.add(name)
    assert seen >= {"bench", "calibrate", "compare", "eval", "run", "sweep", "elastic_kv_cli"}


def blocks(document):
    return re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def given(code):
    """Return what an example's reader has at hand: a model and its inputs, where the code does not make them."""
    if not re.search(r"\bmodel\b", code):
        return {}
    import torch

    from tests.helpers.tiny_models import tiny_llama

    model = tiny_llama().model
    model.generation_config.max_new_tokens = 4
    ids = torch.arange(1, 101)[None] % 127
    return {"model": model, "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}


EXAMPLES = [document for document in DOCUMENTS if blocks(document)]


@pytest.mark.parametrize("document", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_run_in_their_order(document, tmp_path, monkeypatch):
    import elastickv.sweeps.scheduler  # noqa: F401
    from elastickv import benchmark
    from elastickv.backends.registry import BACKENDS
    from elastickv.benchmark.contenders import peers
    from elastickv.results import formats, result_metrics

    (tmp_path / "results").mkdir()
    for name in ("result.json", "before.json", "after.json", "results/result.json"):
        shutil.copyfile(RESULT, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    # What takes long and is tested elsewhere: ceilings, and the CPU's kernels in the processes of a sweep.
    monkeypatch.setattr(sys.modules[benchmark.run.__module__], "CEILING_ROUNDS", 1)
    monkeypatch.setattr(
        sys.modules["elastickv.sweeps.scheduler"], "PROGRAM", (sys.executable, "-m", "tests.helpers.reference_worker")
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "src"))))
    examples = blocks(document)
    names = given("".join(examples))
    # What an example adds to the program is taken away again.
    with (
        warnings.catch_warnings(),
        mock.patch.dict(BACKENDS), mock.patch.dict(formats.FORMATS),
        mock.patch.dict(result_metrics.METRICS), mock.patch.object(peers, "PEERS", peers.PEERS),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        for number, code in enumerate(examples, 1):
            exec(compile(code, f"{document.name}, example {number}", "exec"), names)


def test_no_docstring_holds_an_example_that_nobody_runs():
    sources = [path for path in (ROOT / "src").rglob("*.py") if ">>>" in path.read_text(encoding="utf-8")]
    assert not sources, "write it into a document, whose examples are run"
