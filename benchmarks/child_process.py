"""A command that has a time limit, in a session of its own: what it started ends with it."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

LOOK_S = 0.5
LEAST_S = 1.0


def run_command(
    command: list[str],
    seconds: float,
    variables: Mapping[str, str] | None = None,
    look: Callable[[], None] = lambda: None,
    only_errors: bool = False,
) -> tuple[int | None, str]:
    """Return the exit status of a command, None if it took too long, and what it said.

    Parameters
    ----------
    seconds : that it may take; it has one at least.
    variables : of its environment; None: of this process.
    look : called every half second while it runs, and after it.
    only_errors : whether what it writes to the standard output is left out of what it said.
    """
    end, status = time.monotonic() + max(LEAST_S, seconds), None
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        output = subprocess.DEVNULL if only_errors else log
        process = subprocess.Popen(command, stdout=output, stderr=log, env=variables, start_new_session=True)
        try:
            while status is None and (left := end - time.monotonic()) > 0:
                with suppress(subprocess.TimeoutExpired):
                    status = process.wait(timeout=min(left, LOOK_S))
                look()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        return status, log.read()
