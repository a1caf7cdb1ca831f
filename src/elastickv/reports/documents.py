"""Files of results as JSON objects: single results, JSON Lines such as sweeps, folders of either."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from elastickv.errors import UsageError

_SUFFIXES = (".json", ".jsonl")
_ACCEPTED = "a result of `elastickv bench`, a sweep, or a folder of them"


@dataclass(frozen=True)
class Document:
    """One JSON value of a file.

    Attributes
    ----------
    source : the file, and the line in it where it has several.
    value : what it holds.
    """

    source: str
    value: Any


def documents(path: Path, notes: list[str]) -> Iterator[Document]:
    """Yield what the file holds, or every .json and .jsonl file of the folder and of those in it, in order of their names.

    Parameters
    ----------
    notes : gets a line for a last line that was cut off, as a killed process leaves it.

    Raises
    ------
    UsageError : naming the file that is missing, unreadable, no JSON, or holds nothing.
    """
    try:
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in _SUFFIXES and file.is_file()]
            if not files:
                raise UsageError(f"{path} holds no .json or .jsonl file: give {_ACCEPTED}")
        elif path.exists():
            files = [path]
        else:
            raise UsageError(f"{path} does not exist: give {_ACCEPTED}")
        for file in files:
            yield from _values(file, notes)
    except OSError as error:
        raise UsageError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None


def _values(file: Path, notes: list[str]) -> Iterator[Document]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text (byte {error.start}): give {_ACCEPTED}") from None
    if not text.strip():
        raise UsageError(f"{file} is empty: give {_ACCEPTED}")
    if file.suffix.lower() != ".jsonl":
        yield Document(str(file), _parse(text, str(file)))
        return
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        source = f"{file}:{number}"
        if line.strip():
            try:
                yield Document(source, _parse(line, source))
            except UsageError:
                if number < len(lines) or line.endswith("\n") or number == 1:
                    raise
                notes.append(f"{source} was cut off while it was written, and is left out")


def _parse(text: str, source: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise UsageError(f"{source} holds {constant}, which is no figure: measure again")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{source} is no JSON (line {error.lineno}, column {error.colno}: {error.msg}): cut off or edited; measure again"
        ) from None
    except RecursionError:
        raise UsageError(f"{source} nests too deep for a result: give {_ACCEPTED}") from None
