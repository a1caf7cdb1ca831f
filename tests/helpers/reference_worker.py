"""The worker process of a sweep, its backend the NumPy reference: real results, without what compiling and ceilings take."""

import sys

import elastickv.benchmark.runner  # noqa: F401
from elastickv.sweeps import worker
from tests.helpers.reference_backend import ReferenceBackend

worker.load = sys.modules["elastickv.benchmark.runner"].load = lambda name, device: (ReferenceBackend(), None)

if __name__ == "__main__":
    worker.main()
