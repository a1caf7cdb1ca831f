"""Schedule cells on devices: one process per device measures, this one writes."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from elastickv.benchmark.options import Options
from elastickv.errors import DeviceFailure, UsageError
from elastickv.sweeps.journal import Journal
from elastickv.sweeps.plan import Cell, SweepPlan, key

_SOURCE = str(Path(__file__).parents[2])
_PATIENCE_S = 5.0
_MOST_LOSSES = 2
PROGRAM = (sys.executable, "-m", "elastickv.sweeps.worker")


class Watcher(Protocol):
    """Receives the progress of a sweep."""

    def begin(self, done: int, total: int) -> None:
        """`done` of `total` cells are in the file already."""

    def working(self, cell: Cell, phase: str, share: float) -> None:
        """A cell is in this phase, of which this share is done."""

    def finished(self, cell: Cell, status: str, reason: str | None) -> None:
        """A cell is in the file."""

    def left_out(self, device: int | None, reason: str) -> None:
        """A device measures no more cells."""


@contextmanager
def _signals_for_us_only() -> Iterator[None]:
    """Start processes that ignore Ctrl-C and SIGTERM, which go to the whole group: this process ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """One process, and the cell that it measures."""

    def __init__(self, plan: SweepPlan, device: int | None, slot: int, events: "queue.Queue[tuple[_Worker, str, Any]]") -> None:
        self.device, self.slot, self.phase = device, slot, ""
        self.cell: Cell | None = None
        paths = [_SOURCE, *filter(None, [os.environ.get("PYTHONPATH")])]
        with _signals_for_us_only():
            self._process = subprocess.Popen(
                PROGRAM,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            )
        self._listener = threading.Thread(target=self._listen, args=(events,), daemon=True)
        self._listener.start()
        chosen = {"backend": plan.settings.get("backend", Options.backend), "input": plan.settings.get("input")}
        self._send(chosen | {"device": device})

    def measure(self, cell: Cell, request: dict[str, Any]) -> None:
        """Begin a cell."""
        self.cell = cell
        self._send(request)

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._listener.join()
        # Closes both pipes, and waits.
        self._process.__exit__(None, None, None)

    def cause(self) -> str:
        """Return why the process ended by itself."""
        code = self._process.wait()
        if code == -getattr(signal, "SIGKILL", 9):
            return "the process that measured was killed, as systems do where memory runs out"
        return f"the process that measured ended with {f'signal {-code}' if code < 0 else f'code {code}'}"

    def _send(self, value: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()
        except OSError:  # on Windows not always a BrokenPipeError
            pass  # Its end is an event of its own.

    def _listen(self, events: "queue.Queue[tuple[_Worker, str, Any]]") -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                kind, value = json.loads(line)
            except ValueError:
                break  # Killed in the middle of a line.
            events.put((self, kind, value))
        events.put((self, "ended", None))


class _WorkerPool:
    """The processes, their current cells, and the cells that are still waiting.

    A device that fails repeatedly would fail all cells faster than the others measure any: while others are left, a cell whose
    process or device was lost is measured by another, and a device that lost two cells in a row gets no more.
    """

    def __init__(
        self, plan: SweepPlan, journal: Journal, watcher: Watcher, devices: Sequence[int | None], command: tuple[str, ...]
    ) -> None:
        self._plan, self._journal, self._watcher, self._command = plan, journal, watcher, command
        self._waiting = [cell for cell in plan.cells if key(cell) not in journal.done]
        for unfit in [cell for cell in self._waiting if key(cell) in plan.refused]:
            self._finish(unfit, {"status": "refused", "reason": plan.refused[key(unfit)]})
            self._waiting.remove(unfit)
        self._devices = list(devices[: len(self._waiting)])
        self._losses = [0] * len(self._devices)
        self._lost: dict[str, int] = {}
        self.workers: list[_Worker] = []
        self.events: queue.Queue[tuple[_Worker, str, Any]] = queue.Queue()

    def start(self) -> None:
        """Start a process for each device."""
        for slot in range(len(self._devices)):
            self._begin(slot)

    def end(self) -> None:
        """Kill all processes."""
        while self.workers:
            self.workers.pop().end()

    def take(self, worker: _Worker, kind: str, value: Any) -> None:
        """Handle a message of a process.

        Raises
        ------
        UsageError : if a device can't be used at all.
        DeviceFailure : if there is none left to measure on.
        """
        if worker not in self.workers:
            return
        cell = worker.cell
        if kind in ("phase", "progress"):
            worker.phase = value if kind == "phase" else worker.phase
            if cell is not None:
                self._watcher.working(cell, worker.phase, 0.0 if kind == "phase" else value)
        elif cell is None and kind in ("unable", "broken", "ended"):
            if kind == "unable" and not self._losses[worker.slot]:
                raise UsageError(value)
            reason = value or f"{worker.cause()} before its first cell: see what it wrote above"
            self._drop(worker)
            self._leave_out(worker, reason)
        elif kind in ("ready", "done"):
            if cell is not None:
                self._losses[worker.slot] = 0
                self._finish(cell, value)
            self._next(worker)
        elif cell is not None:
            self._replace(worker, cell, kind, value)

    def _begin(self, slot: int) -> None:
        self.workers.append(_Worker(self._plan, self._devices[slot], slot, self.events))

    def _drop(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.end()

    def _next(self, worker: _Worker) -> None:
        """Start the next cell of a process; end the process if there is none for it."""
        cell = self._pick(worker.slot)
        if cell is None:
            self._drop(worker)
        else:
            worker.measure(cell, self._plan.request(cell, worker.device, self._command))

    def _pick(self, slot: int) -> Cell | None:
        fit = (i for i, cell in enumerate(self._waiting) if self._lost.get(key(cell)) != slot)
        index = next(fit, None)
        return None if index is None else self._waiting.pop(index)

    def _replace(self, worker: _Worker, cell: Cell, kind: str, value: Any) -> None:
        """Replace a process that is lost or unusable by a new one."""
        record = {"status": "failed", "reason": worker.cause()} if kind == "ended" else value
        self._drop(worker)
        if kind == "spent":
            self._losses[worker.slot] = 0
        else:
            self._losses[worker.slot] += 1
        if kind != "spent" and self.workers and key(cell) not in self._lost:
            self._lost[key(cell)] = worker.slot
            self._waiting.insert(0, cell)
        else:
            self._finish(cell, record)
        if self.workers and self._losses[worker.slot] >= _MOST_LOSSES:
            self._leave_out(worker, record["reason"])
        elif any(self._lost.get(key(waiting)) != worker.slot for waiting in self._waiting):
            self._begin(worker.slot)
        self._record_the_rest(record["reason"])

    def _leave_out(self, worker: _Worker, reason: str) -> None:
        self._watcher.left_out(worker.device, reason)
        self._record_the_rest(reason)

    def _record_the_rest(self, reason: str) -> None:
        """Where no process is left, record the cells that were lost once; a resumed sweep can measure the others."""
        if self.workers:
            return
        for cell in [cell for cell in self._waiting if key(cell) in self._lost]:
            self._waiting.remove(cell)
            self._finish(cell, {"status": "failed", "reason": reason})
        if self._waiting:
            raise DeviceFailure(f"{reason}; {len(self._waiting)} cells are not measured: `resume=True` goes on")

    def _finish(self, cell: Cell, record: dict[str, Any]) -> None:
        self._journal.append({"cell": cell} | record)
        self._watcher.finished(cell, record["status"], record["reason"])


def measure(
    plan: SweepPlan,
    journal: Journal,
    watcher: Watcher,
    devices: Sequence[int | None] = (None,),
    time_limit_s: float | None = None,
    command: tuple[str, ...] = (),
) -> bool:
    """Measure the cells of `plan` that `journal` lacks; return whether it has all of them now.

    Parameters
    ----------
    devices : numbers of CUDA devices, a process each; None is the default one.
    time_limit_s : stop after this many seconds; cells in progress are dropped and measured when the sweep is resumed.

    Raises
    ------
    UsageError : if a device can't be used at all, or the file can't be written any more.
    DeviceFailure : if no device is left.
    """
    deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
    watcher.begin(len(journal.done), len(plan.cells))
    pool = _WorkerPool(plan, journal, watcher, devices, command)
    try:
        pool.start()
        while pool.workers:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            try:
                pool.take(*pool.events.get(timeout=_PATIENCE_S if left is None else min(left, _PATIENCE_S)))
            except queue.Empty:
                continue
    finally:
        pool.end()
    return len(journal.done) == len(plan.cells)
