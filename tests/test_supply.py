"""Dependencies are bounded, justified and permissively licensed; another Python is found where there is one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import check  # noqa: E402
import licences  # noqa: E402

EXTRAS = ["cuda", "cuda13", "report", "test", "transformers"]
DIRECT = [text for text in licences.required(EXTRAS) if not text.startswith("elastickv[")]


@pytest.mark.parametrize("requirement", DIRECT)
def test_a_dependency_is_bounded_above_and_below(requirement):
    versions = requirement.partition(";")[0]
    assert re.search(r"==\d", versions) or (re.search(r">=\d", versions) and re.search(r"<\d", versions))


def test_every_dependency_is_justified():
    table = re.findall(r"^\| ([a-z][^|]*) \|", (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8"), re.MULTILINE)
    names = {name for row in table for name in re.findall(r"[a-z0-9][a-z0-9-]*[a-z0-9]", re.sub(r"\[.*?\]", "", row))}
    wanted = {re.split(r"[<>=!~;\[ ]", text)[0] for text in DIRECT}
    without_suffix = {"nvidia-cuda-nvrtc", "nvidia-cuda-runtime"}  # of cuda13, in its paragraph
    assert wanted - names <= without_suffix


def test_what_is_installed_is_permitted():
    refused = [row[:3] for row in licences.rows(EXTRAS) if not row[3]]
    assert refused == []
    assert {"numpy", "numba", "llvmlite"} <= {row[0] for row in licences.rows([])}


@pytest.mark.parametrize("text", ["GPL-3.0-only", "MIT AND AGPL-3.0-only", "UNKNOWN", ""])
def test_another_licence_is_refused(monkeypatch, text):
    monkeypatch.setattr(licences, "closure", lambda extras: ["numpy"])
    monkeypatch.setattr(licences, "licence", lambda name: text)
    assert [row[3] for row in licences.rows([])] == [False]


def test_nvidias_licence_is_for_nvidias_packages_only(monkeypatch):
    monkeypatch.setattr(licences, "closure", lambda extras: ["numpy"])
    monkeypatch.setattr(licences, "licence", lambda name: licences.NVIDIA)
    assert [row[3] for row in licences.rows([])] == [False]


def test_another_python_is_another_and_starts():
    found = check.another_python()
    if found is None:
        pytest.skip("no other Python here")
    version = subprocess.run(
        [found, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True, check=True
    )
    major, minor = map(int, version.stdout.split())
    assert (major, minor) >= (3, 10)
    assert minor != sys.version_info.minor


def test_a_shim_that_stands_for_no_python_is_passed_over(monkeypatch, tmp_path):
    for minor in check.MINORS:
        shim = tmp_path / f"python3.{minor}"
        shim.write_text("#!/bin/sh\nexit 127\n")
        shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "absent"))
    assert check.another_python() is None


def test_the_quick_tests_exist():
    assert all((ROOT / path).exists() for path in check.QUICK)
