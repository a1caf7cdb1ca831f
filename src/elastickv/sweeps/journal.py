"""The file of a sweep: a header, then one line a cell. It outlives a kill at any moment.

A line is written by one call and synchronised before the next cell is counted. A line that a kill cut off has no newline at its
end: it is dropped, and its cell is measured again.
"""

import fcntl
import json
import os
import stat
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from elastickv.benchmark.environment import environment
from elastickv.errors import UsageError
from elastickv.inputs import parse_json, read_bytes
from elastickv.results.files import check_writable
from elastickv.sweeps import baseline_cells
from elastickv.sweeps.axes import AXES
from elastickv.sweeps.plan import SweepPlan, key, name

VERSION = 1
MAX_FILE_BYTES = 1 << 32  # a hundred thousand cells with their raw samples
_BEGINNING = b'{"sweep": '  # of a header, which a kill may have cut off
STATUSES = ("ok", "does not fit", "refused", "failed")


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the header and the cells of a sweep's file, or of one that `Sweep.save` wrote as .json.

    A line that was cut off is left out.

    Raises
    ------
    UsageError : naming the file and the line that is no part of a sweep.
    """
    content = _content(path)
    header, *records = _saved(content, path) if path.suffix.lower() == ".json" else _lines(content, path)
    head = header.get("sweep")
    if not isinstance(head, dict) or not isinstance(head.get("plan_hash"), str):
        raise UsageError(f"{path}:1 is no header of a sweep: give the file of a sweep")
    if head.get("version") != VERSION:
        raise UsageError(
            f"{path} is of sweep version {head.get('version')}, this program reads {VERSION}: use the one that wrote it"
        )
    axes, cells = head.get("axes"), head.get("cells")
    known = (
        isinstance(axes, dict)
        and set(axes) <= {*AXES, *baseline_cells.AXES}
        and all(isinstance(found, list) for found in axes.values())
    )
    if not known or type(cells) is not int:
        raise UsageError(f"{path}:1 is a damaged header of a sweep: its axes or cells are none; measure again")
    seen: set[str] = set()
    for number, record in enumerate(records, 2):
        if not isinstance(record.get("cell"), dict) or record.get("status") not in STATUSES:
            raise UsageError(f"{path}:{number} is no cell of a sweep: the file was edited; take the line out")
        if key(record["cell"]) in seen:
            raise UsageError(f"{path}:{number} holds {name(record['cell'])} a second time: take one of the lines out")
        seen.add(key(record["cell"]))
    return head, records


def _content(path: Path) -> bytes:
    return read_bytes(path, str(path), "give the file of a sweep", MAX_FILE_BYTES)


def _lines(content: bytes, path: Path) -> list[dict[str, Any]]:
    lines = content.split(b"\n")[:-1]
    if not lines:
        raise UsageError(f"{path} holds no whole line: give the file of a sweep")
    return [_object(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _saved(content: bytes, path: Path) -> list[dict[str, Any]]:
    whole = _object(content, str(path))
    cells = whole.get("cells")
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise UsageError(f"{path} holds no cells: give the file of a sweep")
    return [{"sweep": whole.get("sweep")}, *cells]


def _object(line: bytes, source: str) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"{source} is no JSON object: the file was edited or is damaged; take the line out")
    return value


class Journal:
    """A sweep's file while it is written; a context manager that keeps other sweeps off the file.

    With `retry_failed` a file that is resumed loses its failed cells first: it is replaced by one without them.

    Attributes
    ----------
    done : keys of the cells that the file holds.
    other_version : what wrote the file's beginning where that is another version than this one; else None.

    Raises
    ------
    UsageError : if the file holds another plan, is there and is not to be resumed, or is being written by another sweep.
    """

    def __init__(
        self, path: Path, plan: SweepPlan, resume: bool, command: tuple[str, ...] = (), retry_failed: bool = False
    ) -> None:
        check_writable(path)
        self.path, self.done = path, set[str]()
        self._retry_failed = retry_failed
        self.other_version: str | None = None
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        # A file that was replaced stays locked with its successor: who opened it before must not write into it.
        self._held = [self._file]
        try:
            self._lock(self._file)
            try:
                self._begin(plan, resume, command)
            finally:
                if not os.fstat(self._file).st_size:  # There was no room for the first line.
                    path.resolve().unlink(missing_ok=True)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, UsageError) and not self.done:
            self.path.resolve().unlink(missing_ok=True)  # What was asked for is refused: nothing was measured.
        self._close()

    def append(self, record: dict[str, Any]) -> None:
        """Add one cell.

        Raises
        ------
        UsageError : if the file cannot be written; the cells before stay.
        """
        self._write(record)
        self.done.add(key(record["cell"]))

    def _close(self) -> None:
        for file in self._held:
            os.close(file)

    def _lock(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file).st_nlink:
                raise BlockingIOError  # It was replaced, or taken away, between being opened and being locked.
        except BlockingIOError:
            raise UsageError(f"--output {self.path} is being written by another sweep: wait, or give another name") from None

    def _begin(self, plan: SweepPlan, resume: bool, command: tuple[str, ...]) -> None:
        content = _content(self.path)
        whole = content.rfind(b"\n") + 1
        if not whole and not (content.startswith(_BEGINNING) or _BEGINNING.startswith(content)):
            raise UsageError(f"--output {self.path} exists and is no sweep: give another name")
        if whole and not resume and not read(self.path)[1]:
            whole, resume = 0, True  # A sweep that ended before its first cell holds nothing to lose.
        if not whole and os.fstat(self._file).st_size and not resume:
            raise UsageError(f"--output {self.path} exists: --resume continues it, or give another name")
        here = environment()
        if not whole:
            os.ftruncate(self._file, 0)
            head = {"version": VERSION, "plan_hash": plan.hash, "cells": len(plan.cells), "axes": plan.axes}
            self._write({"sweep": head | {"settings": plan.settings, "command": list(command), "environment": here}})
            return
        if not resume:
            raise UsageError(f"--output {self.path} exists: --resume continues it, or give another name")
        head, records = read(self.path)
        if head["plan_hash"] != plan.hash:
            raise UsageError(
                f"--output {self.path} holds another plan ({head['plan_hash']}, this one is {plan.hash}): "
                "give its options again, or another name"
            )
        planned = {key(cell) for cell in plan.cells}
        for number, record in enumerate(records, 2):
            if key(record["cell"]) not in planned:
                raise UsageError(f"{self.path}:{number} holds a cell that the plan does not have: take the line out")
            if not self._retry_failed or record["status"] != "failed":
                self.done.add(key(record["cell"]))
        os.ftruncate(self._file, whole)
        if len(self.done) < len(records):
            self._replace([line for line in self.path.read_bytes().splitlines(keepends=True) if self._stays(line)])
        began = head.get("environment")
        began = began.get("commit") if isinstance(began, dict) else None
        self.other_version = began if began != here["commit"] else None

    def _stays(self, line: bytes) -> bool:
        value = json.loads(line)
        return "cell" not in value or key(value["cell"]) in self.done

    def _replace(self, lines: list[bytes]) -> None:
        """Put a file with these lines in the place of the present one, locked before it has the name."""
        target = self.path.resolve()
        file, temporary = tempfile.mkstemp(dir=target.parent, prefix=".elastickv.", suffix=".tmp")
        self._held.append(file)
        try:
            self._lock(file)
            with open(file, "wb", closefd=False) as out:
                out.writelines(lines)
            os.fsync(file)
            os.fchmod(file, stat.S_IMODE(os.fstat(self._file).st_mode))
            os.replace(temporary, target)
        except BaseException as error:
            Path(temporary).unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise self._full(error) from None
            raise
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_APPEND)
        self._file = file

    def _full(self, error: OSError) -> UsageError:
        said = error.strerror or str(error)
        return UsageError(f"--output {self.path} cannot be written: {said}; its cells stay: make room, and --resume goes on")

    def _write(self, value: dict[str, Any]) -> None:
        line = (json.dumps(value, allow_nan=False) + "\n").encode()
        before = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, before)
            raise self._full(error) from None
        except BaseException:
            # Ctrl-C: no half of a line may stand before the next one. A whole one is a cell that is measured.
            if line:
                os.ftruncate(self._file, before)
            raise
