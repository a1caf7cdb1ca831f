"""The benchmark of models that are split over GPUs: ranks have the same random weights, and a run that fails is named."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.helpers.ranks import run_on_ranks  # noqa: E402

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PLAN = {"model": "shape:tiny", "context": 300, "compress": [1.0, 2.0], "tokens": 3, "samples": 2, "device": "cpu"}


def script():
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module("tensor_parallel")


def rows_of_rank(folder):
    """Return the rows of a rank, of a shape with two KV heads."""
    from elastickv.model_benchmark import shapes

    shapes.SHAPES["tiny"] = replace(shapes.SHAPES["tiny"], kv_heads=2)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return {"rows": script().measure(PLAN | {"rows": str(folder / "rows.json")}, rank, ranks, torch.device("cpu"))}


@pytest.fixture(scope="module")
def each(tmp_path_factory):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("PyTorch is built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    return [run_on_ranks(rows_of_rank, folder, count, "gloo") for count in (1, 2)]


def test_ranks_generate_the_tokens_of_one(each):
    (alone,), ranks = each
    assert [row["cache"] for row in alone["rows"]] == ["stock", "C=1", "C=2"]
    for rank in ranks:
        assert [row["tokens_sha256"] for row in rank["rows"]] == [row["tokens_sha256"] for row in alone["rows"]]
        assert all(len(row["samples_ms"]) == 2 and row["ms"] > 0 for row in rank["rows"])


def test_a_rank_holds_its_share(each):
    (alone,), ranks = each
    for rank in ranks:
        for row, whole in zip(rank["rows"], alone["rows"], strict=True):
            assert 0.4 < row["kv_allocated_bytes"] / whole["kv_allocated_bytes"] < 0.6


def test_a_run_that_fails_is_named(tmp_path, monkeypatch, capsys):
    target = tmp_path / "result.json"
    options = ["--device=cpu", "--gpus=1", "--context=9000", "--compress=2", "--model=shape:tiny"]
    monkeypatch.setattr(sys, "argv", ["tensor_parallel.py", f"--output={target}", *options])
    assert script().main() == 1
    (run,) = json.loads(target.read_text())["runs"]
    assert run["failed"].startswith("exit status 2: tensor_parallel.py: 9000 tokens of prompt and ")
    assert "1 GPU: " in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--gpus=0", "--context=none", "--compress=-1", "--tokens=0", "--samples=1.5"])
def test_an_option_that_is_not_accepted_is_named(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tensor_parallel.py", option])
    with pytest.raises(SystemExit, match="2"):
        script().main()
    name, _, value = option.partition("=")
    assert f"argument {name}: '{value}': give " in capsys.readouterr().err
