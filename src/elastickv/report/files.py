"""Files appear whole or not at all."""

import os
import tempfile
from pathlib import Path

from elastickv.errors import UsageError


def check_writable(path: Path) -> None:
    """Refuse an output path before hours are spent on what it should hold.

    Raises
    ------
    UsageError : if the folder does not exist or cannot be written, or the path is a folder.
    """
    folder = path.parent
    if path.is_dir():
        raise UsageError(f"--output {path} is a folder: give the name of a file")
    if not folder.is_dir():
        raise UsageError(f"--output {path}: the folder {folder} does not exist; create it first")
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise UsageError(f"--output {path} cannot be written: {error.strerror or error}; choose another folder") from None


def write_text(path: Path, text: str) -> None:
    """Write `text` under a temporary name beside `path` and rename it: atomic for readers.

    Raises
    ------
    UsageError : if it cannot be written; `path` is then as it was.
    """
    name = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError as error:
        if name is not None and os.path.exists(name):
            os.unlink(name)
        raise UsageError(f"--output {path} cannot be written: {error.strerror or error}; choose another folder") from None
