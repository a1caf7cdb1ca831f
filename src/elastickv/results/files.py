"""Files appear whole or not at all."""

import os
import stat
import tempfile
from pathlib import Path

from elastickv.errors import UsageError

MAX_NAME_BYTES = 255
# The format that a file's suffix names.
SUFFIXES = {".json": "json", ".jsonl": "jsonl", ".csv": "csv", ".md": "md", ".html": "html", ".txt": "table"}


def check_writable(path: Path) -> None:
    """Refuse an output path before hours are spent on what it should hold.

    Raises
    ------
    UsageError : if it is no regular file, its folder does not exist, or either cannot be written.
    """
    try:
        target = path.resolve()
        if target.is_dir():
            raise UsageError(f"`path` {path} is a folder: give the name of a file")
        if not target.parent.is_dir():
            raise UsageError(f"`path` {path}: the folder {target.parent} does not exist; create it first")
        if target.exists() and not target.is_file():
            raise UsageError(f"`path` {path} is not a regular file: give the name of a file")
        if target.exists() and not os.access(target, os.W_OK):
            raise UsageError(f"`path` {path} is write-protected: choose another name")
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".elastickv.", suffix=".tmp")
        os.close(handle)
        os.unlink(name)
        if len(os.fsencode(target.name)) > MAX_NAME_BYTES:
            raise UsageError(f"`path`: a name of {len(target.name)} characters is too long: give at most {MAX_NAME_BYTES}")
    except (OSError, RuntimeError, ValueError) as error:  # pathlib's for links in a circle, and for a zero byte
        if isinstance(error, UsageError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"`path` {path} cannot be written: {reason}; choose another name or folder") from None


def write_text(path: Path, text: str) -> None:
    """Write `text` as `write_bytes` does, in UTF-8; what UTF-8 has no form for is escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name in the same folder and rename it: atomic for readers.

    A link is followed; a file that was there keeps its permissions.

    Raises
    ------
    UsageError : if it cannot be written; `path` is then as it was.
    """
    temporary = None
    try:
        target = path.resolve()
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".elastickv.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _mode(target))
        os.replace(temporary, target)
        temporary = None
    except (OSError, RuntimeError, ValueError) as error:  # as in `check_writable`
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"`path` {path} cannot be written: {reason}; choose another folder") from None
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _mode(target: Path) -> int:
    """Return the permissions of `target`, or those of a new file."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
