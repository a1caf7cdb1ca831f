"""The real worker process with a benchmark that takes no time: what is tested is who writes what, and when.

FAULTS names a file; its lines are faults that come over a device, once each: `1 die`, `1 lose`, `1 unable`, `1 slow`.
With `always` behind it a fault comes each time.
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from elastickv.backends.driver_errors import failure
from elastickv.errors import CompileFailure, DoesNotFit, RanOut, UsageError
from elastickv.sweeps import worker


def due(device, *kinds):
    """Whether one of the faults comes now; it is taken off the list."""
    path = Path(os.environ.get("FAULTS", "/no/such/file"))
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        number, kind = line.removesuffix(" always").split(" ", 1)
        if int(number) == (device or 0) and kind in kinds:
            if not line.endswith(" always"):
                lines.remove(line)
                path.write_text("\n".join(lines))
            return kind
    return None


def run(options, reporter):
    reporter.phase("measuring")
    reporter.progress(1, 2)
    time.sleep(0.03)
    if options.dim == 128:
        raise DoesNotFit("`seq` 9 needs 9 GiB")
    if options.dim == 256:
        os.kill(os.getpid(), signal.SIGKILL)
    if due(options.device, "slow"):
        time.sleep(0.7)
    fault = due(options.device, "die", "lose", "run out", "break", "allocate")
    if fault == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == "lose":
        raise failure(719, "CUDA_ERROR_LAUNCH_FAILED")
    if fault == "run out":
        raise RanOut("the device's memory ran out")
    if fault == "break":
        raise ValueError("two\nlines")
    if fault == "allocate":
        bytearray(1 << 60)
    figures = {"configuration": {"seq_len": options.seq}, "device": options.device, "pid": os.getpid()}
    return SimpleNamespace(as_dict=lambda: figures | {"padding": "x" * 20_000})


def load(backend, device):
    fault = due(device, "unable", "die before", "does not compile")
    if fault == "unable":
        raise UsageError(f"CUDA device {device} does not exist")
    if fault == "does not compile":
        raise CompileFailure("attend.cu does not compile")
    if fault:
        sys.exit(7)


worker.run = run
worker.load = load
worker.load_sample = lambda path: None

if __name__ == "__main__":
    worker.main()
