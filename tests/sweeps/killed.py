"""A sweep with the fake worker, to be killed: python killed.py FILE."""

import sys
from pathlib import Path

from elastickv.sweeps import scheduler
from elastickv.sweeps.sweep import sweep

PLAN = {"seq": "512-1024*2", "batch": "1-8", "heads": [2, 4], "compress": 1.2, "backend": "cpu"}

if __name__ == "__main__":
    scheduler.PROGRAM = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
    sweep(output=sys.argv[1], resume=True, **PLAN)
