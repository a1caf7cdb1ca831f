"""The environment record tells what it can and never fails."""

import json
import os
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import pytest

from elastickv import __version__
from elastickv.benchmark import environment as module
from elastickv.benchmark.environment import COMMIT_FILE, cpu_name, environment, package_commit


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout" / "src" / "elastickv"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    return folder


def test_it_is_json_with_versions_and_a_utc_date() -> None:
    record = environment()
    assert json.loads(json.dumps(record)) == record
    assert record["versions"]["elastickv"] == __version__
    assert record["versions"]["numpy"] == version("numpy")
    assert datetime.fromisoformat(record["date_utc"]).utcoffset() == timezone.utc.utcoffset(None)
    assert record["python"].endswith(".".join(map(str, sys.version_info[:3])))


def test_a_package_that_is_not_installed_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._DISTRIBUTIONS, "flashinfer", ("no-such-distribution",))
    assert environment()["versions"]["flashinfer"] is None


def test_torch_is_not_imported_to_tell_its_version() -> None:
    code = "import sys; from elastickv.benchmark.environment import environment; environment(); print('torch' in sys.modules)"
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=paths)
    assert done.stdout.strip() == "False"


def test_the_commit_of_a_checkout_says_whether_it_was_changed(package: Path) -> None:
    root = package.parents[1]
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    head = git(root, "rev-parse", "HEAD")
    assert package_commit(package) == head
    (package / "__init__.py").write_text("changed = True\n")
    assert package_commit(package) == head + "+changes"


def test_an_installed_package_reports_the_commit_it_was_built_from_not_the_repository_around_it(package: Path) -> None:
    around = package.parents[2]
    git(around, "init", "-q")
    git(around, "commit", "-q", "--allow-empty", "-m", "somebody else's")
    assert package_commit(package) is None
    (package / COMMIT_FILE).write_text("0123abc\n")
    assert package_commit(package) == "0123abc"


def test_without_git_the_commit_is_null(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package.parents[1] / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert package_commit(package) is None


def test_the_processor_is_named_as_the_system_names_it(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Example 9000\n")
    assert cpu_name(cpuinfo) == "Example 9000"
    assert cpu_name(tmp_path / "absent") is None or cpu_name(tmp_path / "absent")
