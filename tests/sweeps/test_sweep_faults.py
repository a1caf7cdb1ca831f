"""A sweep under faults: a finished cell is never lost, a failed one says why, and nothing waits for ever."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from elastickv.cli import sweep as command
from elastickv.errors import DeviceFailure, UsageError
from elastickv.sweeps import scheduler
from elastickv.sweeps.journal import Journal, read
from elastickv.sweeps.plan import SweepPlan, key
from elastickv.sweeps.sweep import sweep
from tests.helpers.full_disk import fill, small_disk

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"
FEW = {"seq": [512, 1024, 2048], "compress": 1.2, "heads": 2}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Cells by the fake worker; returns a function that says which faults come."""
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    monkeypatch.setattr(scheduler, "PROGRAM", (sys.executable, str(HERE / "fake_worker.py")))
    faults = tmp_path / "faults"
    monkeypatch.setenv("FAULTS", str(faults))
    return lambda *lines: faults.write_text("\n".join(lines))


class Watcher:
    """Keeps what it is told."""

    def __init__(self):
        self.out, self.shares = [], []

    def begin(self, done, total):
        pass

    def working(self, cell, phase, share):
        self.shares.append(share)

    def finished(self, cell, status, reason):
        pass

    def left_out(self, device, reason):
        self.out.append((device, reason))


def statuses(found):
    return Counter(cell["status"] for cell in found.cells)


def failed(found):
    return [cell for cell in found.cells if cell["status"] != "ok"]


@pytest.mark.fault("lost device")
@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ("lose", "failed", "context is gone"),
        ("die", "failed", "signal 11"),
        ("break", "failed", "ValueError: two lines"),
        ("run out", "does not fit", "ran out"),
        ("allocate", "does not fit", ""),
    ],
)
def test_a_cell_that_fails_says_why_and_the_next_begins_in_a_fresh_process(fake, tmp_path, fault, status, said):
    fake(f"0 {fault}")
    found = sweep(output=tmp_path / "s.jsonl", backend="cpu", **FEW)
    assert found.complete and statuses(found) == {"ok": 2, status: 1}
    ((one),) = failed(found)
    assert said in one["reason"] and "\n" not in one["reason"]
    assert len({cell["pid"] for cell in found.cells if cell["status"] == "ok"}) == 1


@pytest.mark.fault("one of several devices fails")
@pytest.mark.parametrize("fault", ["lose", "die"])
def test_what_one_device_lost_another_measures(fake, tmp_path, fault):
    fake(f"1 {fault}")
    found = sweep(output=tmp_path / "s.jsonl", devices=[0, 1], **FEW | {"batch": "1-4"})
    assert found.complete and statuses(found) == {"ok": 12}
    assert len(read(tmp_path / "s.jsonl")[1]) == 12


@pytest.mark.fault("one of several devices fails")
def test_a_device_that_fails_again_and_again_is_left_out_and_its_cells_are_measured(fake, tmp_path):
    fake("1 die always", "0 slow always")
    watcher = Watcher()
    found = sweep(output=tmp_path / "s.jsonl", devices=[0, 1], watcher=watcher, **FEW | {"batch": "1-2"})
    assert found.complete and statuses(found) == {"ok": 6}
    assert {cell["device"] for cell in found.cells} == {0}
    ((device, reason),) = watcher.out
    assert device == 1 and "signal 11" in reason
    assert 0.5 in watcher.shares


@pytest.mark.fault("one of several devices fails")
def test_a_device_that_dies_before_its_first_cell_is_left_out(fake, tmp_path):
    fake("1 die before")
    watcher = Watcher()
    found = sweep(output=tmp_path / "s.jsonl", devices=[0, 1], watcher=watcher, **FEW)
    assert found.complete and {cell["device"] for cell in found.cells} == {0}
    assert watcher.out == [(1, "the process that measured ended with code 7 before its first cell: see what it wrote above")]


@pytest.mark.fault("one of several devices fails")
def test_where_every_device_fails_every_cell_is_recorded(fake, tmp_path):
    fake("0 die always", "1 die always")
    found = sweep(output=tmp_path / "s.jsonl", devices=[0, 1], **FEW)
    assert found.complete and statuses(found) == {"failed": 3}


@pytest.mark.fault("one of several devices fails")
def test_a_device_that_cannot_be_used_any_more_ends_the_sweep_and_keeps_its_cells(fake, tmp_path):
    path = tmp_path / "s.jsonl"
    fake("0 lose")
    watcher = Watcher()

    def unable(cell, status, reason):
        fake("0 unable always")

    watcher.finished = unable
    with pytest.raises(DeviceFailure, match="does not exist; 2 cells are not measured: `resume=True` goes on"):
        sweep(output=path, watcher=watcher, **FEW)
    assert [record["status"] for record in read(path)[1]] == ["failed"]
    fake()
    assert statuses(sweep(output=path, resume=True, **FEW)) == {"ok": 2, "failed": 1}
    assert statuses(sweep(output=path, resume=True, retry_failed=True, **FEW)) == {"ok": 3}


@pytest.mark.fault("a kernel that does not compile")
def test_where_no_kernel_compiles_the_sweep_ends_as_a_device_that_fails(fake, tmp_path):
    fake("0 does not compile")
    with pytest.raises(DeviceFailure, match=r"attend\.cu does not compile.* 3 cells are not measured"):
        sweep(output=tmp_path / "s.jsonl", backend="cpu", **FEW)


@pytest.mark.fault("one of several devices fails")
def test_a_device_that_was_never_there_is_refused(fake, tmp_path):
    fake("1 unable")
    with pytest.raises(UsageError, match="device 1 does not exist"):
        sweep(output=tmp_path / "s.jsonl", devices=[0, 1], **FEW)


def test_a_sweep_that_is_refused_before_its_first_cell_leaves_no_file(fake, tmp_path):
    path = tmp_path / "s.jsonl"
    fake("0 unable always")
    with pytest.raises(UsageError, match="device 0 does not exist"):
        sweep(output=path, devices=[0], **FEW)
    assert not path.exists()


@pytest.mark.parametrize("content", ["notes without an end", '{"results": {}}', "\r\r"])
def test_a_file_that_is_no_sweep_is_not_overwritten(fake, tmp_path, content):
    path = tmp_path / "s.jsonl"
    path.write_text(content, newline="")
    for resume in (False, True):
        with pytest.raises(UsageError, match=r"s\.jsonl exists and is no sweep: give another name"):
            sweep(output=path, resume=resume, backend="cpu", **FEW)
    assert path.read_bytes() == content.encode()


def test_a_header_that_was_cut_off_is_written_again(fake, tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text('{"sweep": {"version": 1, "pl')
    fake()
    assert statuses(sweep(output=path, resume=True, backend="cpu", **FEW)) == {"ok": 3}


def test_a_file_that_is_taken_away_before_it_is_locked_is_begun_again(tmp_path, monkeypatch):
    path, plan = tmp_path / "s.jsonl", SweepPlan.of(FEW)
    path.write_text("")
    acquire = Journal._acquire

    def late(journal):
        path.unlink()
        acquire(journal)

    monkeypatch.setattr(Journal, "_acquire", late)
    with Journal(path, plan, resume=False):
        assert read(path)[0]["plan_hash"] == plan.hash


_HOLDER = """
import sys, time
from pathlib import Path
from elastickv.sweeps.journal import Journal
from elastickv.sweeps.plan import SweepPlan
journal = Journal(Path(sys.argv[1]), SweepPlan.of({"seq": [512, 1024, 2048], "compress": 1.2, "heads": 2}), resume=False)
print("locked", flush=True)
time.sleep(60)
"""


@pytest.mark.fault("signals")
def test_a_killed_sweep_locks_nothing_and_its_lock_file_goes_with_the_next_one(tmp_path):
    path, plan = tmp_path / "s.jsonl", SweepPlan.of(FEW)
    command = [sys.executable, "-c", _HOLDER, str(path)]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(SOURCE)}, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(UsageError, match="is being written by another sweep: wait, or give another name"):
            Journal(path, plan, resume=True)
        process.kill()
    assert {p.name for p in tmp_path.iterdir()} == {"s.jsonl", ".s.jsonl.lock"}
    with Journal(path, plan, resume=True):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["s.jsonl"]


def test_a_link_to_a_file_has_the_lock_of_the_file(tmp_path):
    path, link, plan = tmp_path / "s.jsonl", tmp_path / "link.jsonl", SweepPlan.of(FEW)
    link.symlink_to(path)
    with Journal(path, plan, resume=False), pytest.raises(UsageError, match="another sweep"):
        Journal(link, plan, resume=True)


_NO_POSIX = """
import signal, sys, warnings
warnings.simplefilter("ignore")  # filelock says that it falls back to a weaker lock
for module in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[module] = None
for name in ("SIGHUP", "SIGKILL", "pthread_sigmask", "SIG_BLOCK", "SIG_SETMASK"):
    delattr(signal, name)
import elastickv.sweeps.worker
from elastickv.cli import COMMANDS, root
from elastickv.cli.error_handling import exit_with
import importlib
for name in COMMANDS:
    importlib.import_module(f"elastickv.cli.{name}")
from pathlib import Path
from elastickv.sweeps.scheduler import _signals_for_us_only
from elastickv.sweeps.sweep import sweep
with _signals_for_us_only():
    pass
from elastickv.sweeps.journal import Journal
from elastickv.sweeps.plan import SweepPlan
plan = SweepPlan.of({"seq": [512, 1024], "compress": 1.2, "heads": 2})
with Journal(Path(sys.argv[1]), plan, resume=False) as journal:
    journal.append({"cell": plan.cells[0], "status": "failed", "reason": "x"})
"""


def test_sweeps_and_the_command_line_start_where_a_system_is_no_posix(tmp_path):
    path = tmp_path / "s.jsonl"
    command = [sys.executable, "-c", _NO_POSIX, str(path)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(SOURCE)}, check=True, timeout=120)
    assert len(read(path)[1]) == 1 and [p.name for p in tmp_path.iterdir()] == ["s.jsonl"]


def test_failed_cells_are_measured_again_when_asked_for(fake, tmp_path):
    path = tmp_path / "s.jsonl"
    fake("0 break")
    first = sweep(output=path, backend="cpu", **FEW)
    path.chmod(0o640)
    fake()
    assert statuses(sweep(output=path, backend="cpu", resume=True, **FEW)) == {"ok": 2, "failed": 1}
    again = sweep(output=path, backend="cpu", resume=True, retry_failed=True, **FEW)
    assert again.complete and statuses(again) == {"ok": 3}
    kept = {key(cell["cell"]): cell for cell in first.cells if cell["status"] == "ok"}
    assert all(cell == kept.get(key(cell["cell"]), cell) for cell in again.cells)
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faults", "s.jsonl"]
    with pytest.raises(UsageError, match="give `resume=True` too"):
        sweep(output=path, retry_failed=True, **FEW)


def test_a_file_whose_failed_cells_are_retried_stays_locked(fake, tmp_path):
    path = tmp_path / "s.jsonl"
    fake("0 break")
    sweep(output=path, backend="cpu", **FEW)
    plan = SweepPlan.of(FEW | {"backend": "cpu"})
    before = path.stat().st_ino
    with Journal(path, plan, resume=True, retry_failed=True) as journal:
        assert len(journal.done) == 2 and len(read(path)[1]) == 2 and path.stat().st_ino != before
        with pytest.raises(UsageError, match="another sweep"):
            Journal(path, plan, resume=True)
        journal.append({"cell": next(c for c in plan.cells if key(c) not in journal.done), "status": "failed", "reason": "x"})
    assert len(read(path)[1]) == 3


@pytest.mark.fault("disk full")
def test_a_full_disk_keeps_the_cells_before_and_resume_goes_on(fake, tmp_path):
    fake()
    with small_disk(tmp_path / "disk", 32) as disk:
        if disk is None:
            pytest.skip("no file system may be mounted here")
        path = disk / "s.jsonl"
        fill(disk)
        with pytest.raises(UsageError, match="No space left on device"):
            sweep(output=path, backend="cpu", **FEW)
        assert [p.name for p in disk.iterdir()] == ["filler"]
        (disk / "filler").unlink()
        with pytest.raises(UsageError, match=r"No space left on device.*`resume=True` goes on"):
            sweep(output=path, backend="cpu", **FEW)
        assert path.read_bytes().endswith(b"\n")
        assert {record["status"] for record in read(path)[1]} == {"ok"}
        assert [p.name for p in disk.iterdir()] == ["s.jsonl"]
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        assert statuses(sweep(output=path, backend="cpu", resume=True, **FEW)) == {"ok": 3}


@pytest.mark.fault("disk full")
@pytest.mark.parametrize("call", ["fsync", "write"])
def test_a_line_that_cannot_be_written_leaves_no_half_of_it(fake, tmp_path, monkeypatch, call):
    plan = SweepPlan.of(FEW)

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    with Journal(tmp_path / "s.jsonl", plan, resume=False) as journal:
        before = journal.path.read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr(f"elastickv.sweeps.journal.os.{call}", full)
            with pytest.raises(UsageError, match="No space left"):
                journal.append({"cell": plan.cells[0], "status": "failed", "reason": "x" * 9999})
        assert journal.path.read_bytes() == before and not journal.done


_PROGRAM = """
import sys
from elastickv.sweeps import scheduler
scheduler.PROGRAM = (sys.executable, {worker!r})
from elastickv.cli import main
main()
"""
_MANY = ["sweep", "--seq=512-4096*2", "--batch=1-16", "--heads=2", "--compress=1.2", "--backend=cpu", "--format=none"]


def start(path, *arguments, **options):
    program = _PROGRAM.format(worker=str(HERE / "fake_worker.py"))
    return subprocess.Popen(
        [sys.executable, "-c", program, *_MANY, f"-o{path}", *arguments],
        env=os.environ | {"PYTHONPATH": str(SOURCE)}, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


@pytest.mark.fault("signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_keeps_every_finished_cell(tmp_path, number):
    path = tmp_path / "s.jsonl"
    process = start(path, start_new_session=True)
    while not (path.exists() and path.read_bytes().count(b"\n") > 3):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert "--resume goes on" in said.splitlines()[-1] and "Traceback" not in said
    records = read(path)[1]
    assert path.read_bytes().endswith(b"\n") and {record["status"] for record in records} == {"ok"}
    assert 2 <= len(records) < 64
    with pytest.raises(ProcessLookupError):  # no worker outlives it
        os.killpg(process.pid, 0)


def test_the_bar_shows_how_far_a_cell_is():
    cells = command.Cells()
    cells.begin(0, 2)
    for share, said in ((0.0, "seq=512: measuring"), (0.35, "seq=512: measuring 35%")):
        cells.working({"seq": 512}, "measuring", share)
        assert cells._progress.tasks[0].description == said


def test_a_device_that_is_left_out_is_told(capsys):
    command.Cells().left_out(1, "the device's context is gone")
    assert capsys.readouterr().err == "elastickv: warning: device 1 is left out: the device's context is gone\n"
