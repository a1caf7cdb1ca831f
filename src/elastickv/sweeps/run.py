"""Cells to devices: one process a device measures, this one writes."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from elastickv.errors import UsageError
from elastickv.measure import Options
from elastickv.sweeps.journal import Journal
from elastickv.sweeps.plan import Cell, Plan, key

_SOURCE = str(Path(__file__).parents[2])
_PATIENCE_S = 5.0
PROGRAM = (sys.executable, "-m", "elastickv.sweeps.worker")


class Watcher(Protocol):
    """Told how a sweep goes."""

    def begin(self, done: int, total: int) -> None:
        """`done` of `total` cells are in the file already."""

    def working(self, cell: Cell, phase: str, share: float) -> None:
        """A cell is in this phase, of which this share is done."""

    def finished(self, cell: Cell, status: str, reason: str | None) -> None:
        """A cell is in the file."""


class _Worker:
    """One process, and the cell that it measures."""

    def __init__(self, plan: Plan, device: int | None, events: "queue.Queue[tuple[_Worker, str, Any]]") -> None:
        self.device, self.phase = device, ""
        self.cell: Cell | None = None
        paths = [_SOURCE, *filter(None, [os.environ.get("PYTHONPATH")])]
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
        if code == -signal.SIGKILL:
            return "the process that measured was killed, as systems do where memory runs out"
        return f"the process that measured ended with {f'signal {-code}' if code < 0 else f'code {code}'}"

    def _send(self, value: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
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


def measure(
    plan: Plan,
    journal: Journal,
    watcher: Watcher,
    devices: Sequence[int | None] = (None,),
    time_limit_s: float | None = None,
    command: tuple[str, ...] = (),
) -> bool:
    """Measure the cells of `plan` that `journal` lacks; return whether it has all of them now.

    Parameters
    ----------
    devices : numbers of CUDA devices, a process each; None is the usual one.
    time_limit_s : after that many seconds what is being measured is dropped, to be measured when the sweep is resumed.

    Raises
    ------
    UsageError : if a device can't be used at all.
    """
    deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
    watcher.begin(len(journal.done), len(plan.cells))
    waiting = [cell for cell in plan.cells if key(cell) not in journal.done]

    def finish(cell: Cell, record: dict[str, Any]) -> None:
        journal.append({"cell": cell} | record)
        watcher.finished(cell, record["status"], record["reason"])

    for unfit in [cell for cell in waiting if key(cell) in plan.refused]:
        finish(unfit, {"status": "refused", "reason": plan.refused[key(unfit)]})
        waiting.remove(unfit)
    events: queue.Queue[tuple[_Worker, str, Any]] = queue.Queue()
    workers: list[_Worker] = []
    waiting.reverse()
    try:
        workers += [_Worker(plan, device, events) for device in devices[: len(waiting)]]
        while workers:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            try:
                worker, kind, value = events.get(timeout=_PATIENCE_S if left is None else min(left, _PATIENCE_S))
            except queue.Empty:
                continue
            cell = worker.cell
            if kind == "unable":
                raise UsageError(value)
            if kind in ("phase", "progress"):
                worker.phase = value if kind == "phase" else worker.phase
                if cell is not None:
                    watcher.working(cell, worker.phase, 0.0 if kind == "phase" else value)
                continue
            if kind == "ended":
                if cell is None and worker in workers:
                    raise UsageError(f"{worker.cause()} before its first cell: see what it wrote above")
                if cell is None:
                    continue
                value = {"status": "failed", "reason": worker.cause()}
                workers.remove(worker)
                worker.end()
                if waiting:
                    workers.append(_Worker(plan, worker.device, events))
            if cell is not None:
                worker.cell = None
                finish(cell, value)
            if kind != "ended":
                if waiting:
                    upcoming = waiting.pop()
                    worker.measure(upcoming, plan.request(upcoming, worker.device, command))
                else:
                    workers.remove(worker)
                    worker.end()
    finally:
        for worker in workers:
            worker.end()
    return len(journal.done) == len(plan.cells)
