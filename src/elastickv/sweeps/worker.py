"""The measuring process: reads options as JSON lines on standard input, writes events as JSON lines on standard output."""

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
    """A reporter that sends messages to the parent."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def send(self, kind: str, value: Any) -> None:
        """Send one line."""
        self._out.write(json.dumps([kind, value], allow_nan=False) + "\n")
        self._out.flush()

    def phase(self, name: str) -> None:
        """Send the beginning of a phase."""
        self.send("phase", name)

    def progress(self, done: int, total: int) -> None:
        """Send the share of samples that are taken, twenty times a cell."""
        if done * 20 // total != (done - 1) * 20 // total:
            self.send("progress", done / total)


def measured(request: dict[str, Any], reporter: JsonLinesReporter) -> tuple[str, dict[str, Any]]:
    """Return the state of this process after a cell, and the cell's status with its result or the reason why it has none.

    The state is 'done', ready for another cell; 'spent', if the failure may have left something behind; or 'lost'.
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
    return "done", {
        "status": "ok",
        "reason": (result.get("recipe") or {}).get("fallback") if "bench" in request else None,
    } | result


def _result(request: dict[str, Any], reporter: JsonLinesReporter) -> dict[str, Any]:
    if "baseline" in request:
        with device_failures():
            return baseline_cells.measured(request["baseline"], tuple(request["command"]), reporter)
    options = request["bench"]
    options["input"] = None if options["input"] is None else Path(options["input"])
    return run(Options(**options | {"command": tuple(options["command"])}), reporter).as_dict()


def main() -> None:
    """Serve until standard input ends, then exit at once: the parent may have been killed."""
    out = JsonLinesReporter(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    # What a library prints must not mix with our lines.
    os.dup2(2, 1)
    requests: queue.Queue[dict[str, Any]] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    first = requests.get()
    try:
        load(first["backend"], first["device"])
        load_sample(None if first["input"] is None else Path(first["input"]))
    except (UsageError, DeviceFailure) as error:
        out.send("broken" if isinstance(error, DeviceFailure) else "unable", str(error))
        return
    out.send("ready", None)
    while True:
        state, record = measured(requests.get(), out)
        out.send(state, record)
        if state != "done":
            os._exit(0)  # Skips clean-ups, which may hang on a device that is gone.


if __name__ == "__main__":
    main()
