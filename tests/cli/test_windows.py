"""The program without what only POSIX has, as on Windows: modules, functions of `os`, signals, the number of a closed pipe."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastickv.cli import standard_streams
from elastickv.cli.output import show

ROOT = Path(__file__).parents[2]
# The program alone is on Windows here: other packages and the standard library chose their code for this system.
SHIM = """
import builtins, os, signal, sys, types
MODULES = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "curses", "readline", "posix", "crypt"}
FUNCTIONS = ("fork forkpty getuid geteuid getgid getegid getgroups getpgid getpgrp setsid setpgid killpg uname nice getloadavg "
             "sched_getaffinity sched_setaffinity sysconf statvfs mkfifo mknod chroot chown fchown fchmod lchown wait3 wait4 "
             "pread pwrite register_at_fork posix_fadvise posix_spawn ctermid sync O_NONBLOCK O_CLOEXEC O_NOFOLLOW O_DIRECTORY "
             "O_SYNC WNOHANG").split()
SIGNALS = ("SIGHUP SIGKILL SIGQUIT SIGALRM SIGUSR1 SIGUSR2 SIGCHLD SIGPIPE SIGSTOP SIGTSTP SIGCONT SIGWINCH pthread_sigmask "
           "pthread_kill setitimer alarm pause sigwait SIG_BLOCK SIG_SETMASK").split()

def without(module, names):
    reduced = types.ModuleType(module.__name__)
    vars(reduced).update({name: value for name, value in vars(module).items() if name not in names})
    return reduced

def as_on_windows():
    imported = builtins.__import__
    reduced = {"os": without(os, FUNCTIONS), "signal": without(signal, SIGNALS)}
    def checked(name, *arguments, **options):
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("elastickv"):
            return imported(name, *arguments, **options)
        if name.partition(".")[0] in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return reduced.get(name) or imported(name, *arguments, **options)
    builtins.__import__ = checked
"""
PROGRAM = """
as_on_windows()
from elastickv.cli import error_handling, main
assert not hasattr(error_handling.os, "fork") and not hasattr(error_handling.signal, "SIGHUP")
sys.argv = ["elastickv", *sys.argv[1:]]
if {reference}:
    import runpy
    runpy.run_path({path!r}, run_name="__main__")
else:
    main()
"""
BENCH = ["--warmup=1", "--inner-loops=2", "--cache=hot", "--heads=2", "--reps=4"]


def without_posix(*arguments, reference=False, cwd=None):
    path = str(Path(__file__).with_name("reference_bench.py"))
    program = SHIM + PROGRAM.format(reference=reference, path=path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False, cwd=cwd)


def test_bench_compare_and_report_with_backslashes_in_every_name(tmp_path):
    folder = tmp_path / "a\\b"
    folder.mkdir()
    names = [folder / "C:\\x\\1.json", folder / "C:\\x\\2.json"]
    for name in names:
        done = without_posix("bench", *BENCH, "--seq=340", "--compress=1.3", f"--output={name}", reference=True)
        assert done.returncode == 0, done.stderr
    compared = without_posix("compare", *names)
    assert compared.returncode == 0, compared.stderr
    page = folder / "C:\\page.html"
    shown = without_posix("report", *names, "-o", page, "--title", "C:\\x\\1 \\g<0>")
    assert shown.returncode == 0, shown.stderr
    assert "C:\\x\\1 \\g&lt;0&gt;" in page.read_text(encoding="utf-8")


def test_sweep(tmp_path):
    target = tmp_path / "s\\x.jsonl"
    done = without_posix(
        "sweep", *BENCH, "--backend=cpu", "--seq=300", "--compress=1.3", f"--output={target}", "--export", f"{target}.csv"
    )
    assert done.returncode == 0, done.stderr
    header, cell = map(json.loads, target.read_text(encoding="utf-8").splitlines())
    assert cell["status"] == "ok", cell["reason"]
    assert header["sweep"]["cells"] == 1 and "Traceback" not in done.stderr.decode("cp1252")


def test_run(tmp_path):
    target = tmp_path / "r\\x.json"
    done = without_posix("run", "shape:tiny", "--prompt", "C:\\x", "--max-new-tokens=2", f"-o{target}")
    assert done.returncode == 0, done.stderr
    assert json.loads(target.read_text(encoding="utf-8"))["command"][3:5] == ["--prompt", "C:\\x"]


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EINVAL, "Invalid argument")])
def test_a_reader_that_leaves_is_no_error_there_either(monkeypatch, error):
    class Left:
        encoding = "utf-8"

        def write(self, text):
            raise error

        def flush(self):
            pass

        def fileno(self):
            raise OSError

    monkeypatch.setattr(standard_streams, "_WINDOWS", True)
    monkeypatch.setattr(sys, "stdout", Left())
    show("text")
    monkeypatch.setattr(standard_streams, "_WINDOWS", False)
    assert standard_streams.reader_left(OSError(errno.EINVAL, "Invalid argument")) is False
