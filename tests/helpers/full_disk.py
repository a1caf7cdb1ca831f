"""A file system that is full: a tmpfs of 64 KiB where the tests may mount one, else the call that writes fails."""

import os
import subprocess
from contextlib import contextmanager


@contextmanager
def small_disk(folder, kib=64):
    """Mount a tmpfs of `kib` KiB on `folder`; yields None where that is not allowed."""
    folder.mkdir(exist_ok=True)
    options = f"size={kib}k"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(folder):
    """Leave no room in `folder`."""
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            os.fsync(file.fileno())
