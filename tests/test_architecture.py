"""Imports point downward only, and PyTorch stays where it belongs."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "elastickv"
FLOORS = [
    "version",
    "errors",
    "inputs",
    "recipe",
    "kvcache",
    "backends",
    "benchmark",
    "transformers",
    "evaluation",
    "results",
    "model_benchmark",
    "html_report",
    "sweeps",
    "api",
    "cli",
]
FILES = sorted(SOURCE.rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


def floor(module):
    parts = module.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 and parts[0] == "elastickv" and parts[1] in FLOORS else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downward(path):
    here = path.relative_to(SOURCE).with_suffix("").parts[0]
    if here in ("__init__", "__main__"):
        return
    assert here in FLOORS, f"say in FLOORS on which floor {here} stands"
    for module in imported(path):
        above = floor(module)
        assert above is None or above <= FLOORS.index(here), f"{here} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_peers_import_torch(path):
    allowed = path.relative_to(SOURCE).as_posix() in (
        "benchmark/contenders/flash_infer.py",
        "benchmark/contenders/flex_attention.py",
        "benchmark/contenders/torch_sdpa.py",
        "benchmark/contenders/torch_timing.py",
    )
    allowed = allowed or path.relative_to(SOURCE).parts[0] in ("transformers", "evaluation", "model_benchmark")
    assert allowed or not {module.split(".")[0] for module in imported(path)} & {"flashinfer", "torch"}


@pytest.mark.parametrize("path", sorted((SOURCE / "benchmark" / "contenders").glob("*.py")), ids=lambda path: path.name)
def test_peers_import_torch_only_when_they_run(path):
    loaded = [
        node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert not any(word.split(".")[0] in ("flashinfer", "torch") for node in loaded for word in ast.unparse(node).split())


@pytest.mark.parametrize("path", [p for p in FILES if "backends" not in p.parts], ids=lambda path: path.name)
def test_device_libraries_stay_in_the_back_ends(path):
    assert not {module.split(".")[0] for module in imported(path)} & {"numba", "cuda", "llvmlite"}
