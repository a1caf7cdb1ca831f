"""The programs under faults, as a shell sees them: signals, readers that leave, full disks, devices that fail."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import click
import pytest

from elastickv.cli.error_handling import exit_with
from elastickv.errors import CompileFailure, DeviceFailure, DeviceLost, DoesNotFit, KernelMismatch, NonFiniteError, RanOut
from elastickv.results.files import write_bytes, write_text
from tests.helpers.full_disk import fill, small_disk

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, str(Path(__file__).with_name("reference_bench.py"))]
BENCH = [
    "bench",
    "--seq=340",
    "--heads=2",
    "--compress=1.3",
    "--warmup=1",
    "--inner-loops=2",
    "--cache=hot",
    "--paired-baseline",
]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "COLUMNS": "100"}
PIPES = {"env": ENVIRONMENT, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}


def shell(line, *arguments):
    """Run a line of bash in which "$@" is the program with its arguments."""
    command = ["bash", "-o", "pipefail", "-c", line, "bash", *PROGRAM, *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)


def test_a_gate_that_is_not_passed_decides_the_exit_code():
    done = shell('"$@"', *BENCH, "--reps=4", "--gate", "cv>=1000000")
    assert done.returncode == 1 and "FAIL" in done.stdout, done.stderr


@pytest.mark.fault("signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_middle_of_measuring_leaves_a_whole_result_marked_incomplete(tmp_path, number):
    path = tmp_path / "result.json"
    process = subprocess.Popen([*PROGRAM, *BENCH, "--reps=100000", "--json", f"--output={path}"], **PIPES)
    for line in process.stderr:
        if "elastickv: measuring " in line and "against" in line:
            break
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(number)
    shown, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    result = json.loads(path.read_text())
    assert result == json.loads(shown)
    assert result["complete"] is False and len(result["samples"]["elastic"]) >= 2
    assert "Traceback" not in said and list(tmp_path.iterdir()) == [path]


@pytest.mark.fault("signals")
def test_a_signal_before_there_is_anything_to_keep_is_one_line(tmp_path):
    process = subprocess.Popen([*PROGRAM, *BENCH, "--warmup=100000", f"--output={tmp_path / 'x.json'}"], **PIPES)
    for line in process.stderr:
        if "elastickv: warming up" in line:
            break
    process.send_signal(signal.SIGTERM)
    shown, said = process.communicate(timeout=60)
    assert (process.returncode, shown) == (143, "")
    assert said.strip() == "elastickv: error: interrupted before there was a result to keep"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("signals")
def test_a_program_that_was_told_to_ignore_hang_ups_does(monkeypatch):
    seen = []

    @click.command()
    def ignoring():
        seen.append(signal.getsignal(signal.SIGHUP))
        os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert code_of(ignoring, monkeypatch) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == [signal.SIG_IGN]


_SWALLOWING = """
import os, sys, time, click
from elastickv.cli.error_handling import exit_with

class Callback:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        return [None for _ in range(9)]

@click.command()
@click.argument("number")
def working(number):
    Callback()
    while True:
        time.sleep(0.01)

exit_with(working, "elastickv")
"""


@pytest.mark.fault("signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_a_callback_where_python_drops_exceptions_ends_the_program_all_the_same(number):
    command = [sys.executable, "-c", _SWALLOWING, str(int(number))]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr == "elastickv: error: interrupted before there was a result to keep\n"


@pytest.mark.fault("a reader that leaves")
@pytest.mark.parametrize(
    ("line", "code", "out"),
    [
        ('"$@" compare a b 2>&-', 2, ""),
        ('"$@" compare a b <&- >&- 2>&-', 2, ""),
        ('"$@" run shape:none <&-', 2, ""),
        ('"$@" --version 2>&- <&-', 0, "elastickv"),
    ],
)
def test_closed_standard_streams_are_no_error_and_no_message_gets_into_the_output(line, code, out):
    done = shell(line)
    assert (done.returncode, done.stdout[: len("elastickv")]) == (code, out)
    assert "Traceback" not in done.stderr


@pytest.mark.fault("a reader that leaves")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        ([*BENCH, "--reps=4", "--json"], 0),
        # What the gate says does not depend on who reads the result.
        ([*BENCH, "--reps=4", "--json", "--gate=cv>=1000000"], 1),
    ],
)
def test_a_reader_that_leaves_is_no_error(arguments, code, tmp_path):
    done = shell('"$@" | true', *arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "error" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.fault("disk full")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_standard_output_is_one_line_and_the_file_is_written(tmp_path):
    path = tmp_path / "result.json"
    done = shell('"$@" > /dev/full', *BENCH, "--reps=4", f"--output={path}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("elastickv: error: output: No space left on device")
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert json.loads(path.read_text())["complete"]


@pytest.mark.fault("disk full")
def test_a_full_disk_loses_no_result_and_no_older_file(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        if disk is None:
            pytest.skip("no file system may be mounted here")
        (disk / "result.json").write_text("older\n")
        fill(disk)
        done = shell('"$@"', *BENCH, "--reps=4", "--json", f"--output={disk / 'result.json'}")
        assert done.returncode == 2
        said = f"--output {disk / 'result.json'} cannot be written: No space left on device; choose another folder"
        assert done.stderr.splitlines()[-1] == f"elastickv: error: {said}"
        assert json.loads(done.stdout)["complete"]
        assert (disk / "result.json").read_text() == "older\n"
        assert sorted(path.name for path in disk.iterdir()) == ["filler", "result.json"]


@pytest.mark.fault("disk full")
@pytest.mark.parametrize("call", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize("write", [lambda path: write_text(path, "new"), lambda path: write_bytes(path, b"new")])
def test_whatever_call_meets_a_full_disk_the_old_file_stays(tmp_path, monkeypatch, call, write):
    path = tmp_path / "result.json"
    path.write_text("older")

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(f"elastickv.results.files.os.{call}", full)
        with pytest.raises(ValueError, match="No space left on device"):
            write(path)
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


def code_of(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["elastickv"])
    with pytest.raises(SystemExit) as stop:
        exit_with(command, "elastickv")
    return stop.value.code


CODES = {
    0: [None],
    1: [KernelMismatch("off"), NonFiniteError("nan")],
    2: [DoesNotFit("large"), RanOut("full"), MemoryError(), OSError(errno.ENOSPC, "full", "x"), click.UsageError("no")],
    4: [DeviceFailure("bad"), DeviceLost("gone"), CompileFailure("x.cu"), RuntimeError("CUDA_ERROR_LAUNCH_FAILED")],
    130: [KeyboardInterrupt(), click.Abort(), EOFError()],
}


@pytest.mark.fault("a kernel that does not compile")
@pytest.mark.fault("lost device")
@pytest.mark.fault("out of memory")
@pytest.mark.parametrize(("code", "error"), [(code, error) for code, errors in CODES.items() for error in errors], ids=repr)
def test_exit_codes(code, error, monkeypatch, capsys):
    @click.command()
    def failing():
        if error is not None:
            raise error

    assert code_of(failing, monkeypatch) == code
    said = capsys.readouterr().err
    assert said.count("\n") == (error is not None) and "Traceback" not in said


def test_an_error_that_nobody_foresaw_keeps_its_trace(monkeypatch):
    @click.command()
    def failing():
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["elastickv"])
    with pytest.raises(ZeroDivisionError):
        exit_with(failing, "elastickv")


def test_the_exit_codes_are_documented_in_one_place():
    text = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8").partition("## Exit codes")[2]
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.M)}
    assert documented == {*CODES, 3, 129, 143}


@pytest.mark.fault("read-only kernel cache")
def test_a_warning_is_one_line(monkeypatch, capsys):
    @click.command()
    def warning():
        warnings.warn("compiled kernels cannot be kept", stacklevel=1)

    assert code_of(warning, monkeypatch) == 0
    assert capsys.readouterr().err == "elastickv: warning: compiled kernels cannot be kept\n"


@pytest.mark.fault("signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_evaluation_that_is_ended_keeps_the_rows_that_are_finished(elastickv, folder, tmp_path, monkeypatch, number):
    from elastickv.evaluation import evaluate

    rows, score, path = [], evaluate.score, tmp_path / "result.json"

    def ending(*arguments):
        rows.append(1)
        if len(rows) == 2:
            os.kill(os.getpid(), number)
        return score(*arguments)

    monkeypatch.setattr(evaluate, "score", ending)
    quick = ["--context=500", "--windows=2", "--scored=4", "--compress=1,2", "--needle=450", "--depths=2", "--greedy=0"]
    text = f"--text={folder.parent / 'text.txt'}"
    done = elastickv("eval", str(folder), text, f"-o{path}", "--tolerance=kl=0.001", *quick)
    assert done.returncode == 128 + number, done.stderr
    record = json.loads(path.read_text())
    assert [row["cache"] for row in record["rows"]] == ["C=1"]
    assert record["complete"] is False and record["suggestion"] is None and record["needle"] == []
    assert "Incomplete. Rows" in done.stdout and list(tmp_path.iterdir()) == [path]


@pytest.mark.fault("signals")
def test_an_evaluation_that_is_ended_at_once_leaves_nothing(elastickv, folder, tmp_path, monkeypatch):
    from elastickv.evaluation import evaluate

    monkeypatch.setattr(evaluate, "prefill", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    text = f"--text={folder.parent / 'text.txt'}"
    done = elastickv("eval", str(folder), text, f"-o{tmp_path / 'x.json'}", "--context=500", "--windows=2", "--scored=4")
    assert done.returncode == 143 and done.stdout == "" and list(tmp_path.iterdir()) == []
    assert done.stderr.splitlines()[-1] == "elastickv: error: interrupted before there was a result to keep"
