"""Files of results as JSON objects: single results, JSON Lines such as sweeps, folders of either."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastickv.errors import UsageError
from elastickv.inputs import parse_json, read_text

MAX_ENTRIES = 100_000
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
            files = [file for file in sorted(_entries(path)) if file.suffix.lower() in _SUFFIXES and file.is_file()]
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


def _entries(folder: Path) -> Iterator[Path]:
    for number, path in enumerate(folder.rglob("*")):
        if number == MAX_ENTRIES:
            raise UsageError(f"{folder} holds more than {MAX_ENTRIES} files: give the folder of the results alone")
        yield path


def _values(file: Path, notes: list[str]) -> Iterator[Document]:
    text = read_text(file, str(file), f"give {_ACCEPTED}")
    if not text.strip():
        raise UsageError(f"{file} is empty: give {_ACCEPTED}")
    if file.suffix.lower() != ".jsonl":
        yield Document(str(file), _parse(text, str(file)))
        return
    # Not `splitlines`, which also splits at characters that a JSON string may contain.
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        source = f"{file}:{number}"
        if line.strip():
            try:
                yield Document(source, _parse(line, source))
            except UsageError:
                if number < len(lines) or number == 1:
                    raise
                notes.append(f"{source} was cut off while it was written, and is left out")


def _parse(text: str, source: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise UsageError(f"{source} is no JSON ({error}): cut off or edited; measure again") from None
