"""The process that measures: options as JSON lines on standard input, what happens as JSON lines on standard output."""

import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

from elastickv.backends import load
from elastickv.data import load_sample
from elastickv.errors import DoesNotFit, UsageError
from elastickv.measure import Options, run
from elastickv.sweeps import baselines


class Told:
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


def measured(request: dict[str, Any], reporter: Told) -> dict[str, Any]:
    """Return a cell's status with its result or the reason why it has none."""
    try:
        result = _result(request, reporter)
        json.dumps(result, allow_nan=False)
    except (DoesNotFit, MemoryError) as error:
        return {"status": "does not fit", "reason": str(error) or "the process ran out of memory"}
    except UsageError as error:
        return {"status": "failed", "reason": str(error)}
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        # Drivers have exceptions of their own, all of which name the code.
        full = "OUT_OF_MEMORY" in reason.upper().replace(" ", "_")
        return {"status": "does not fit" if full else "failed", "reason": reason}
    return {"status": "ok", "reason": None} | result


def _result(request: dict[str, Any], reporter: Told) -> dict[str, Any]:
    if "baseline" in request:
        return baselines.measured(request["baseline"], tuple(request["command"]), reporter)
    given = request["bench"]
    given["input"] = None if given["input"] is None else Path(given["input"])
    return run(Options(**given | {"command": tuple(given["command"])}), reporter).as_dict()


def main() -> None:
    """Serve until standard input ends, and end at once with it: the parent may have been killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    told = Told(os.fdopen(os.dup(1), "w", encoding="utf-8"))
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
    except UsageError as error:
        told.tell("unable", str(error))
        return
    told.tell("ready", None)
    while True:
        told.tell("done", measured(asked.get(), told))


if __name__ == "__main__":
    main()
