"""The file of a sweep: a header, then one line a cell. It survives a kill at any time.

Each line is written and flushed to disk before the next cell is counted. A line that a kill cut off has no newline at its end:
it is dropped, and its cell is measured again.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from elastickv.benchmark.environment import environment
from elastickv.benchmark.from_dict import from_dict
from elastickv.benchmark.options import AXES
from elastickv.errors import UsageError
from elastickv.inputs import parse_json, read_bytes
from elastickv.results.files import check_writable, write_bytes
from elastickv.results.kinds.sweep_record import SweepHeader
from elastickv.sweeps import baseline_cells
from elastickv.sweeps.plan import SweepPlan, key, name

VERSION = 1
MAX_FILE_BYTES = 1 << 32  # a hundred thousand cells with their raw samples
_BEGINNING = b'{"sweep": '  # of a header, which a kill may have cut off
_NO_FILE = -1
_APPEND = os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0)
# Axis -> the key of a result's configuration that repeats it.
_CONFIGURED = {
    "seq": "seq_len", "batch": "batch", "compress": "compression", "heads": "heads", "kv_heads": "kv_heads", "dim": "head_dim",
    "cache": "cache",
}  # fmt: skip
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
        and all(isinstance(axis, list) for axis in axes.values())
    )
    if not known or type(cells) is not int:
        raise UsageError(f"{path}:1 is a damaged header of a sweep: its axes or cells are missing; measure again")
    from_dict(SweepHeader, head, f"{path}:1")
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
    """A sweep's file while it is written; a context manager that locks the file against other sweeps.

    The lock is a hidden empty file beside it, `.NAME.lock`, which is removed at the end. The lock ends with the process: a
    file left behind by a killed process locks nothing.

    With `retry_failed` a file that is resumed loses its failed cells first: it is replaced by one without them.

    Attributes
    ----------
    done : keys of the cells that the file holds.
    other_version : the commit that wrote the file's header where that is another one than this; else None.

    Raises
    ------
    UsageError : if the file holds another plan, exists and is not to be resumed, or is being written by another sweep.
    """

    def __init__(
        self, path: Path, plan: SweepPlan, resume: bool, command: tuple[str, ...] = (), retry_failed: bool = False
    ) -> None:
        check_writable(path)
        self.path, self.done = path, set[str]()
        self._target = path.resolve()
        self._retry_failed = retry_failed
        self.other_version: str | None = None
        # The lock belongs to the process, not to a thread: any thread may release it.
        self._lock = FileLock(self._target.with_name(f".{self._target.name}.lock"), thread_local=False)
        self._acquire()
        self._file = _NO_FILE
        try:
            self._file = os.open(self._target, _APPEND | os.O_CREAT, 0o666)
            try:
                self._begin(plan, resume, command)
            finally:
                if self._file != _NO_FILE and not os.fstat(self._file).st_size:  # There was no room for the first line.
                    self._remove()
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, UsageError) and not self.done:
            self._remove()  # The request is refused: nothing was measured.
        self._close()

    def append(self, record: dict[str, Any]) -> None:
        """Add one cell.

        Raises
        ------
        UsageError : if the file cannot be written; the cells before stay.
        """
        self._write(record)
        self.done.add(key(record["cell"]))

    def _acquire(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(f"`output` {self.path} is being written by another sweep: wait, or give another name") from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise UsageError(f"`output` {self.path} cannot be locked: {reason}; choose another name or folder") from None

    def _close(self) -> None:
        self._close_file()
        with suppress(OSError):  # Windows removes no file that is open: there the release does.
            os.unlink(self._lock.lock_file)
        self._lock.release()

    def _close_file(self) -> None:
        if self._file != _NO_FILE:
            os.close(self._file)
            self._file = _NO_FILE

    def _remove(self) -> None:
        self._close_file()
        self._target.unlink(missing_ok=True)

    def _begin(self, plan: SweepPlan, resume: bool, command: tuple[str, ...]) -> None:
        content = _content(self.path)
        complete = content.rfind(b"\n") + 1
        if not complete and not (content.startswith(_BEGINNING) or _BEGINNING.startswith(content)):
            raise UsageError(f"`output` {self.path} exists and is no sweep: give another name")
        if complete and not resume and not read(self.path)[1]:
            complete, resume = 0, True  # A sweep that ended before its first cell holds nothing to lose.
        if content and not resume:
            raise UsageError(f"`output` {self.path} exists: `resume=True` continues it, or give another name")
        here = environment()
        if not complete:
            os.ftruncate(self._file, 0)
            head = {"version": VERSION, "plan_hash": plan.hash} | plan.header
            self._write({"sweep": head | {"command": list(command), "environment": here}})
            return
        head, records = read(self.path)
        self._check_plan(plan, head, records)
        for record in records:
            if not self._retry_failed or record["status"] != "failed":
                self.done.add(key(record["cell"]))
        os.ftruncate(self._file, complete)
        if len(self.done) < len(records):
            self._replace([line for line in self.path.read_bytes().splitlines(keepends=True) if self._stays(line)])
        began = head.get("environment")
        began = began.get("commit") if isinstance(began, dict) else None
        self.other_version = began if began != here["commit"] else None

    def _check_plan(self, plan: SweepPlan, head: dict[str, Any], records: list[dict[str, Any]]) -> None:
        """Refuse a file of another plan, and one whose hash, header and cells contradict each other.

        Raises
        ------
        UsageError : naming the first contradiction.
        """
        if head["plan_hash"] != plan.hash:
            raise UsageError(
                f"`output` {self.path} holds another plan ({head['plan_hash']}, this one is {plan.hash}): "
                "give its options again, or another name"
            )
        # The hash says what the file should hold; an edited file holds something else under the same hash.
        for item, planned in plan.header.items():
            if item in head and head[item] != json.loads(json.dumps(planned)):
                raise UsageError(
                    f"{self.path}:1 contradicts its own hash {plan.hash}: its {item} are not those of the plan; the file was "
                    "edited: give another name"
                )
        cells = {key(cell) for cell in plan.cells}
        for number, record in enumerate(records, 2):
            if key(record["cell"]) not in cells:
                raise UsageError(f"{self.path}:{number} holds a cell that the plan does not have: take the line out")
            measured = record.get("configuration")
            configuration = measured if isinstance(measured, dict) else {}
            for axis, label in _CONFIGURED.items():
                wanted, repeated = record["cell"].get(axis), configuration.get(label)
                if None not in (wanted, repeated) and wanted != repeated:
                    raise UsageError(
                        f"{self.path}:{number} contradicts itself: {axis}={wanted} in its cell, {label}={repeated} in its "
                        "result; the file was edited: take the line out"
                    )

    def _stays(self, line: bytes) -> bool:
        value = json.loads(line)
        return "cell" not in value or key(value["cell"]) in self.done

    def _replace(self, lines: list[bytes]) -> None:
        """Replace the file by one with these lines."""
        self._close_file()  # Windows replaces no file that is open.
        try:
            write_bytes(self._target, b"".join(lines))
        except UsageError as error:
            raise UsageError(f"{error}; the cells stay") from None
        self._file = os.open(self._target, _APPEND)

    def _full(self, error: OSError) -> UsageError:
        reason = error.strerror or str(error)
        return UsageError(
            f"`output` {self.path} cannot be written: {reason}; its cells stay: make room, and `resume=True` goes on"
        )

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
            # Ctrl-C: half a line must not precede the next one. A whole line is a measured cell.
            if line:
                os.ftruncate(self._file, before)
            raise
