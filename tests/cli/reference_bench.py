"""`elastickv` on the reference backend, whose samples take 2 ms each: python reference_bench.py bench ..."""

import sys
import time
import warnings

from elastickv.benchmark import run
from elastickv.cli import main
from tests.helpers.reference_backend import ReferenceBackend, ReferenceProgram

module = sys.modules[run.__module__]
module.load = lambda name, device, report=None: (ReferenceBackend(), None)
module._sample_accuracy = lambda *_: (None, "left out")
launch = ReferenceProgram.run


def slow(self, launches=1):
    time.sleep(0.002)
    return launch(self, launches)


ReferenceProgram.run = slow
if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
