"""The documents match the files that they describe, and their examples run."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import click
import pytest

ROOT = Path(__file__).parents[1]
README, ARCHITECTURE = ROOT / "README.md", ROOT / "docs" / "architecture.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
SOURCE = ROOT / "src" / "elastickv"
WORKFLOWS = sorted((ROOT / "docs" / "workflows").glob("*.yml"))
QUICKSTART = ROOT / "benchmarks" / "results" / "cpu" / "quickstart.json"
RESULT = ROOT / "benchmarks" / "results" / "cpu" / "short.json"


@pytest.mark.parametrize("tool", ["render_figures", "render_reference", "render_diagrams"])
def test_what_a_tool_writes_is_up_to_date(tool):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{tool}.py"), "--check"],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("document", [*DOCUMENTS, *OTHERS], ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
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


class TinyTokenizer:
    """The few calls that an example makes of a tokenizer."""

    def __call__(self, texts, **_):
        import torch

        ids = torch.tensor([[ord(c) % 127 + 1 for c in text[:100]] for text in texts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids):
        return "".join(map(chr, ids))


@contextmanager
def tiny_models():
    """Let Transformers load a tiny model and tokenizer, whatever an example names."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.helpers.tiny_models import tiny_llama

    with (
        mock.patch.object(AutoModelForCausalLM, "from_pretrained", return_value=tiny_llama().model),
        mock.patch.object(AutoTokenizer, "from_pretrained", return_value=TinyTokenizer()),
    ):
        yield


def predefined(code):
    """Return a model and its inputs, where the example uses them without loading them."""
    if not re.search(r"\bmodel\b", code) or "from_pretrained" in code:
        return {}
    from tests.helpers.tiny_models import tiny_llama

    model = tiny_llama().model
    model.generation_config.max_new_tokens = 4
    return {"model": model, "inputs": TinyTokenizer()(["".join(map(chr, range(100)))])}


# Those of the page about vLLM run where it is installed: tests/vllm_engine/test_serving_page.py.
EXAMPLES = [document for document in DOCUMENTS if blocks(document) and document.name != "vllm.md"]


@pytest.mark.parametrize("document", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_run_in_their_order(document, tmp_path, monkeypatch):
    import elastickv.sweeps.scheduler  # noqa: F401
    from elastickv import benchmark
    from elastickv.backends.registry import BACKENDS
    from elastickv.benchmark.contenders import peers
    from elastickv.kvcache.quantize import CODECS
    from elastickv.kvcache.scorers import SCORERS
    from elastickv.recipe import FORMATS
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
    names = predefined("".join(examples))
    # What an example adds to the program is taken away again.
    with (
        warnings.catch_warnings(), tiny_models() if "from_pretrained" in "".join(examples) else nullcontext(),
        mock.patch.dict(BACKENDS), mock.patch.dict(formats.FORMATS), mock.patch.dict(result_metrics.METRICS),
        mock.patch.object(peers, "PEERS", peers.PEERS),
        mock.patch.dict(FORMATS), mock.patch.dict(CODECS), mock.patch.dict(SCORERS),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        for number, code in enumerate(examples, 1):
            exec(compile(code, f"{document.name}, example {number}", "exec"), names)


def test_no_docstring_holds_an_example_that_nobody_runs():
    sources = [path for path in (ROOT / "src").rglob("*.py") if ">>>" in path.read_text(encoding="utf-8")]
    assert not sources, "write it into a document, whose examples are run"


def test_the_readme_shows_run_eval_and_calibrate():
    assert {name for path, name, _ in commands() if path == README} >= {"bench", "run", "eval", "calibrate"}


def test_the_readme_is_in_order():
    text = README.read_text(encoding="utf-8")
    order = [
        "python3 -m venv .venv",
        "python3 tools/check.py",
        "figures: quickstart",
        "activate",
        "ElasticCache.for_model",
        "figures: results",
    ]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert text[: text.index("figures: quickstart")].count("\n") < 20


def test_the_readme_shows_what_its_first_command_prints():
    from elastickv.benchmark import Result
    from elastickv.results.formats import FORMATS

    text, result = README.read_text(encoding="utf-8"), Result.from_dict(json.loads(QUICKSTART.read_text(encoding="utf-8")))
    first = re.search(r"elastickv (bench .*)$", text, re.MULTILINE)[1].split()
    assert result.configuration.command[1 : len(first) + 1] == first
    # Without the spaces at the ends of wrapped lines.
    printed = "\n".join(map(str.rstrip, FORMATS["table"](result).split("\n")))
    assert f"```text\n{printed}```" in text


def sections():
    """Return the sections of the architecture page by their titles."""
    parts = re.split(r"^## (.*)$", ARCHITECTURE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


HOMES = (SOURCE, SOURCE / "backends", SOURCE / "backends" / "cuda", ROOT)  # folders that documents name files relative to
NAMED_PATH = re.compile(r"`((?:[a-z_0-9.-]+/)+(?:[a-z_0-9-]+\.(?:py|cuh?|json|toml|ipynb))?)`")


@pytest.mark.parametrize("document", [*DOCUMENTS, *OTHERS], ids=lambda path: path.name)
def test_every_file_and_folder_that_a_document_names_exists(document):
    names = {name for name in NAMED_PATH.findall(document.read_text(encoding="utf-8")) if not name.startswith(".venv")}
    assert [name for name in sorted(names) if not any((home / name).exists() for home in HOMES)] == []
    assert document != ARCHITECTURE or len(names) > 50


@pytest.mark.parametrize(
    ("title", "most"), [("The path of `--compress` to a launch", 12), ("The path of a K, V pair to a page", 10)]
)
def test_a_path_in_the_architecture_page_is_short(title, most):
    files = path_files(title)
    assert 3 < len(files) == len(set(files)) <= most
    assert all((SOURCE / name).is_file() for name in files)


def path_files(title):
    """Return the numbered files of a section of the architecture page."""
    return re.findall(r"^\d+\. `([^`]+)`: \S.*$", sections()[title], re.MULTILINE)


def called_files(function):
    """Call a function and return the files of the package of which it calls something, in the order of their first calls."""
    called = {}

    def note(frame, event, _):
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(SOURCE):
            called.setdefault(Path(frame.f_code.co_filename).relative_to(SOURCE).as_posix())

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return list(called)


def of_any_backend(files):
    return [name for name in files if not name.startswith("backends/")]


def test_compress_takes_the_documented_path(monkeypatch, capsys):
    from elastickv.backends.registry import BACKENDS
    from elastickv.cli import bench

    monkeypatch.setitem(BACKENDS, "reference", "tests.helpers.reference_backend")
    arguments = "--seq 340 --heads 2 --reps 2 --warmup 0 --inner-loops 2 --cache hot --backend reference --compress 1.3"
    called = called_files(lambda: bench.command.main(arguments.split(), standalone_mode=False))
    assert "compress=1.3" in capsys.readouterr().out
    documented = of_any_backend(path_files("The path of `--compress` to a launch"))
    assert [name for name in called if name in documented] == documented


def test_a_generated_token_takes_the_documented_path():
    import torch

    import elastickv.transformers as ekv

    model = predefined("model")["model"]
    cache = ekv.ElasticCache.for_model(model, recipe="int8", capture=False)
    tokens = torch.arange(1, 101)[None]
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        called = called_files(lambda: model(tokens[:, :1], past_key_values=cache))
    documented = of_any_backend(path_files("The path of a K, V pair to a page"))
    assert len(documented) == 5 and set(documented) <= set(called)


def test_the_table_of_packages_is_complete():
    names = set(re.findall(r"`([a-z_]+)(?:/|\.py)`", "".join(re.findall(r"^\|(.*?)\|", sections()["The tree"], re.MULTILINE))))
    assert names == {path.stem for path in SOURCE.iterdir() if not path.name.startswith(("_", "py."))}


def test_the_tree_diagram_is_the_import_order():
    sys.path.insert(0, str(ROOT / "tools"))
    from render_diagrams import TREE

    row = {name: number for number, names in enumerate(TREE) for name, _ in names}
    parts = {path.stem if path.is_file() else path.name for path in SOURCE.iterdir() if not path.name.startswith("_")}
    assert set(row) == parts - {"py", "measure"}  # `measure` is a former name of `benchmark`
    for path in SOURCE.rglob("*.py"):
        home = path.relative_to(SOURCE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            target = (node.module if isinstance(node, ast.ImportFrom) else None) or ""
            if home in row and target.startswith("elastickv.") and target.split(".")[1] in row:
                assert row[home] <= row[target.split(".")[1]], f"{path}: {target}"
