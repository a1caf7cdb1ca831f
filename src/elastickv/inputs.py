"""Safe reading of files that a user names: regular files of bounded size, UTF-8, JSON of finite numbers and bounded depth.

Every reader of this package uses these functions. Without them, reading a pipe or a device would never end, and a sparse file
or a very long number would take all memory or time before the file is refused.
"""

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from elastickv.errors import UsageError

MAX_BYTES = 1 << 28
MAX_DIGITS = 20
MAX_DEPTH = 64
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def file_path(name: Any) -> Path:
    """Return the name of a file as a `Path`.

    Raises
    ------
    UsageError : if it is no str or path, or empty: that would be the current folder.
    """
    if isinstance(name, os.PathLike):
        name = os.fspath(name)
    if not isinstance(name, str):
        raise UsageError(f"{name!r} is no name of a file: give a str or a Path")
    if not name:
        raise UsageError("the name of a file is empty: give a name, or . for the current folder")
    return Path(name)


def file_exists(name: str | os.PathLike[str]) -> bool:
    """Return whether a text or path names a regular file; False for what can be no name, such as a text that is too long."""
    return os.path.isfile(name)


def read_bytes(path: Path, what: str, remedy: str, most: int = MAX_BYTES) -> bytes:
    """Return the content of a file.

    Parameters
    ----------
    what : how messages call the file.
    remedy : what messages say to do.
    most : its largest size, bytes.

    Raises
    ------
    UsageError : if it is missing, cannot be read, is no regular file, or is larger.
    """
    try:
        # Opening a pipe must not wait for a writer.
        handle = os.open(path, _FLAGS)
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{what} is {'a folder' if stat.S_ISDIR(status.st_mode) else 'not a regular file'}: {remedy}")
            data = file.read(most + 1) if status.st_size <= most else None
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}; {remedy}") from None
    if data is None or len(data) > most:
        raise UsageError(f"{what} is larger than {most >> 20} MiB: {remedy}")
    return data


def read_text(path: Path, what: str, remedy: str, most: int = MAX_BYTES) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises
    ------
    UsageError : as `read_bytes`, and if it is not UTF-8.
    """
    return decoded(read_bytes(path, what, remedy, most), what, remedy)


def decoded(data: bytes, what: str, remedy: str) -> str:
    """Return bytes as UTF-8 text, without a byte order mark.

    Raises
    ------
    UsageError : if they are not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} is not UTF-8 text (byte {error.start}): {remedy}") from None


def parse_json(text: str | bytes) -> Any:
    """Return a JSON value.

    Raises
    ------
    ValueError : saying why, if it is not JSON, nests deeper than `MAX_DEPTH`, gives an object a key twice, or holds a number
        that is not finite or has more than `MAX_DIGITS` digits before its point.
    """
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_short, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("it nests too deep") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level if isinstance(outer, (dict, list)) for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError("it nests too deep")


def _inside(outer: dict[str, Any] | list[Any]) -> list[Any]:
    items = outer.values() if isinstance(outer, dict) else outer
    return [item for item in items if isinstance(item, (dict, list))]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; refuse two values under one key, which programs read differently."""
    value = dict(pairs)
    if len(value) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"it holds {key[:40]!r} twice")
    return value


def _refuse(number: str) -> NoReturn:
    raise ValueError(f"it holds {number if len(number) < 40 else number[:20] + '...'}, which is no figure")


def _finite(number: str) -> float:
    value = float(number)
    return value if abs(value) < float("inf") else _refuse(number)


def _short(number: str) -> int:
    return int(number) if len(number) <= MAX_DIGITS else _refuse(number)
