"""The process that measures: options as JSON lines on standard input, what happens as JSON lines on standard output."""

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

from elastickv.backends import load
from elastickv.backends.driver_errors import device_failures
from elastickv.benchmark.options import Options
from elastickv.benchmark.runner import run
from elastickv.benchmark.sample_inputs import load_sample
from elastickv.errors import DeviceFailure, DeviceLost, DoesNotFit, KernelMismatch, NonFiniteError, RanOut, UsageError
from elastickv.sweeps import baseline_cells


class JsonLinesReporter:
    """A reporter that tells the parent."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def tell(self, kind: str, value: Any) -> None:
        """Send one line."""
        self._out.write(json.dumps([kind, value], allow_nan=False) + "\n")
        self._out.flush()

    def phase(self, name: str) -> None:
        """Tell that a phase begins."""
        self.tell("phase", name)

    def progress(self, done: int, total: int) -> None:
        """Tell how many samples are taken, twenty times a cell."""
        if done * 20 // total != (done - 1) * 20 // total:
            self.tell("progress", done / total)


def measured(request: dict[str, Any], reporter: JsonLinesReporter) -> tuple[str, dict[str, Any]]:
    """Return a cell's status with its result or the reason why it has none, and how this process stands after it.

    It is 'done', fit for another cell; 'spent', where what went wrong may have left something behind; 'lost', with the device.
    """
    try:
        result = _result(request, reporter)
        json.dumps(result, allow_nan=False)
    except (RanOut, MemoryError) as error:
        return "spent", {"status": "does not fit", "reason": str(error) or "the process ran out of memory"}
    except DoesNotFit as error:
        return "done", {"status": "does not fit", "reason": str(error)}
    except (UsageError, KernelMismatch, NonFiniteError) as error:
        return "done", {"status": "failed", "reason": str(error)}
    except DeviceLost as error:
        return "lost", {"status": "failed", "reason": str(error)}
    except DeviceFailure as error:
        return "spent", {"status": "failed", "reason": str(error)}
    except Exception as error:
        return "spent", {"status": "failed", "reason": " ".join(f"{type(error).__name__}: {error}".split())}
    return "done", {"status": "ok", "reason": None} | result


def _result(request: dict[str, Any], reporter: JsonLinesReporter) -> dict[str, Any]:
    if "baseline" in request:
        with device_failures():
            return baseline_cells.measured(request["baseline"], tuple(request["command"]), reporter)
    given = request["bench"]
    given["input"] = None if given["input"] is None else Path(given["input"])
    return run(Options(**given | {"command": tuple(given["command"])}), reporter).as_dict()


def main() -> None:
    """Serve until standard input ends, and end at once with it: the parent may have been killed."""
    told = JsonLinesReporter(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    # Whatever a library prints must not get among our lines.
    os.dup2(2, 1)
    asked: queue.Queue[dict[str, Any]] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            asked.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    first = asked.get()
    try:
        load(first["backend"], first["device"])
        load_sample(None if first["input"] is None else Path(first["input"]))
    except (UsageError, DeviceFailure) as error:
        told.tell("broken" if isinstance(error, DeviceFailure) else "unable", str(error))
        return
    told.tell("ready", None)
    while True:
        state, record = measured(asked.get(), told)
        told.tell(state, record)
        if state != "done":
            os._exit(0)  # Not by way of clean-ups, which may hang on a device that is gone.


if __name__ == "__main__":
    main()
