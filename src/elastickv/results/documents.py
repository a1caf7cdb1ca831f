"""Files of results as JSON objects: single results, JSON Lines such as sweeps, folders of either."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastickv.errors import UsageError
from elastickv.inputs import parse_json, read_text

Refuse = Callable[[str, UsageError], None]  # receives a file or a line of it, and why it cannot be read
MAX_ENTRIES = 100_000
_SUFFIXES = (".json", ".jsonl")
ACCEPTED = "a result of `elastickv bench`, a sweep, or a folder of them"


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


def file_of(source: str) -> str:
    """Return the file of a document's source: without the line."""
    file, suffix, _ = source.rpartition(".jsonl:")
    return f"{file}.jsonl" if suffix else source


def raise_it(source: str, error: UsageError) -> None:
    """Refuse everything because of one file."""
    raise error


def documents(path: Path, notes: list[str], refuse: Refuse = raise_it) -> Iterator[Document]:
    """Yield what the file holds, or every .json and .jsonl file of the folder and of those in it, in order of their names.

    Parameters
    ----------
    notes : gets a line for a last line that was cut off, as a killed process leaves it.
    refuse : is called with each file or line that is missing, unreadable, no JSON, or holds nothing, and with the reason; if
        it returns, the others are read.

    Raises
    ------
    UsageError : naming the file, unless `refuse` returns.
    """
    try:
        yield from _read(path, notes, refuse)
    except UsageError as error:
        refuse(str(path), error)


def _read(path: Path, notes: list[str], refuse: Refuse) -> Iterator[Document]:
    try:
        if path.is_dir():
            files = [file for file in sorted(_entries(path)) if file.suffix.lower() in _SUFFIXES and file.is_file()]
            if not files:
                raise UsageError(f"{path} holds no .json or .jsonl file: give {ACCEPTED}")
        elif path.exists():
            files = [path]
        else:
            raise UsageError(f"{path} does not exist: give {ACCEPTED}")
    except OSError as error:
        raise UsageError(f"{error.filename or path} cannot be read: {error.strerror or error}; give {ACCEPTED}") from None
    except ValueError as error:  # pathlib's for a zero byte
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} cannot be read: {error}; give {ACCEPTED}") from None
    for file in files:
        try:
            yield from _values(file, notes, refuse)
        except UsageError as error:
            refuse(str(file), error)


def _entries(folder: Path) -> Iterator[Path]:
    for number, path in enumerate(folder.rglob("*")):
        if number == MAX_ENTRIES:
            raise UsageError(f"{folder} holds more than {MAX_ENTRIES} files: give the folder of the results alone")
        yield path


def _values(file: Path, notes: list[str], refuse: Refuse) -> Iterator[Document]:
    text = read_text(file, str(file), f"give {ACCEPTED}")
    if not text.strip():
        raise UsageError(f"{file} is empty: give {ACCEPTED}")
    if file.suffix.lower() != ".jsonl":
        yield Document(str(file), _parse(text, str(file)))
        return
    # Not `splitlines`, which also splits at characters that a JSON string may contain.
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        source = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            value = _parse(line, source)
        except UsageError as error:
            if number == 1:
                raise
            if number < len(lines):
                refuse(source, error)
            else:
                notes.append(f"{source} was cut off while it was written, and is left out")
            continue
        yield Document(source, value)


def _parse(text: str, source: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise UsageError(f"{source} is no JSON ({error}): cut off or edited; measure again") from None
