"""The real worker process with a benchmark that takes no time: what is tested is who writes what, and when."""

import os
import signal
import time
from types import SimpleNamespace

from elastickv.errors import DoesNotFit
from elastickv.sweeps import worker


def run(options, reporter):
    reporter.phase("measuring")
    time.sleep(0.03)
    if options.dim == 128:
        raise DoesNotFit("--seq 9 needs 9 GiB")
    if options.dim == 256:
        os.kill(os.getpid(), signal.SIGKILL)
    return SimpleNamespace(as_dict=lambda: {"configuration": {"seq_len": options.seq}, "padding": "x" * 20_000})


worker.run = run
worker.load = lambda backend, device: None
worker.load_sample = lambda path: None

if __name__ == "__main__":
    worker.main()
