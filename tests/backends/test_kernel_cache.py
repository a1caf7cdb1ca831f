"""The folders of compiled kernels: damaged, full, read-only, and written by several at once."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from elastickv.backends import kernel_cache
from elastickv.backends.kernel_cache import cache_folder, load_compiled, obstacle, save_compiled, writable
from tests.helpers.full_disk import fill, small_disk

SOURCE = Path(kernel_cache.__file__).parents[2]


@pytest.fixture(autouse=True)
def not_warned(monkeypatch):
    monkeypatch.setattr(kernel_cache, "_warned", False)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owner here")
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_what_others_may_write_is_not_ours(tmp_path, mode):
    path = tmp_path / "x.kernel"
    save_compiled(path, b"code")
    assert load_compiled(path) == b"code"
    path.chmod(mode)
    assert load_compiled(path) is None
    save_compiled(path, b"code")
    assert load_compiled(path) == b"code"


@pytest.mark.fault("damaged kernel cache")
@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other"])
def test_a_damaged_file_counts_as_absent_and_is_replaced(tmp_path, damage):
    path = tmp_path / "a" / "x.kernel"
    save_compiled(path, b"code" * 1000)
    whole = path.read_bytes()
    damaged = {
        "empty": b"",
        "cut": whole[:-1],
        "flipped": whole[:99] + bytes([whole[99] ^ 1]) + whole[100:],
        "other": b"notes\n",
    }
    path.write_bytes(damaged[damage])
    assert load_compiled(path) is None
    save_compiled(path, b"code" * 1000)
    assert load_compiled(path) == b"code" * 1000
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.fault("read-only kernel cache")
def test_a_folder_that_is_none_costs_one_warning_and_a_temporary_folder_that_goes(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.warns(UserWarning, match="ELASTICKV_CACHE_DIR"):
        save_compiled(blocked / "x.kernel", b"a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_compiled(blocked / "y.kernel", b"a")
        spare = writable(blocked / "numba")
    assert spare.is_dir() and blocked.read_text() == "not a folder"
    code = (
        "import sys, pathlib as p; from elastickv.backends.kernel_cache import writable; print(writable(p.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(blocked / "numba")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(SOURCE)}, check=True)
    assert not Path(done.stdout.strip()).exists()
    os.rmdir(spare)


@pytest.mark.fault("read-only kernel cache")
def test_a_user_without_a_home_gets_a_temporary_folder_and_a_warning(monkeypatch):
    for name in ("ELASTICKV_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.warns(UserWarning, match="ELASTICKV_CACHE_DIR"):
        assert writable(cache_folder("numba")).is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="the folders of Linux")
def test_the_folder_on_linux_is_the_one_of_the_xdg_standard(monkeypatch, tmp_path):
    for name in ("ELASTICKV_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("numba") == tmp_path / ".cache" / "elastickv" / "numba"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("cuda") == tmp_path / "xdg" / "elastickv" / "cuda"
    monkeypatch.setenv("ELASTICKV_CACHE_DIR", str(tmp_path / "own"))
    assert cache_folder("cuda") == tmp_path / "own"


@pytest.mark.fault("full kernel cache")
def test_a_full_disk_is_noticed_before_and_while_it_is_written(tmp_path):
    with small_disk(tmp_path / "disk", 256) as disk:
        if disk is None:
            pytest.skip("no file system may be mounted here")
        assert obstacle(disk) is None
        fill(disk)
        before = sorted(disk.iterdir())
        assert "No space" in obstacle(disk)
        with pytest.warns(UserWarning, match="No space left on device"):
            save_compiled(disk / "x.kernel", b"code" * 1000)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert writable(disk).parent != disk
        assert sorted(disk.iterdir()) == before


@pytest.mark.fault("full kernel cache")
def test_a_disk_that_fills_up_in_the_middle_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(old, new):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kernel_cache.os, "replace", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        save_compiled(tmp_path / "x.kernel", b"code")
    assert list(tmp_path.iterdir()) == []


_WRITER = """
import sys
from pathlib import Path
from elastickv.backends.kernel_cache import load_compiled, save_compiled
path, body = Path(sys.argv[1]), b"code" * 50_000
for _ in range(40):
    save_compiled(path, body)
    assert load_compiled(path) == body
"""


@pytest.mark.fault("two processes compile at once")
def test_readers_beside_four_writers_see_a_whole_file_or_none(tmp_path):
    path = tmp_path / "new" / "x.kernel"
    command = [sys.executable, "-c", _WRITER, str(path)]
    writers = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(SOURCE)}) for _ in range(4)]
    while any(writer.poll() is None for writer in writers):
        assert not path.exists() or load_compiled(path) == b"code" * 50_000
    assert [writer.returncode for writer in writers] == [0, 0, 0, 0]
    assert list(path.parent.iterdir()) == [path]
