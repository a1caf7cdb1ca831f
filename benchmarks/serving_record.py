"""The record of one process of `serving.py`: what was measured, and what was not and why."""

import json
import math
import time
from pathlib import Path


class NotTogether(RuntimeError):
    """Requests of a batch waited for each other: there was not room for all of them."""


def said(error):
    """Return an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


class Recorder:
    """The record of a process, on disk after each measurement, and the seconds that are left for more of them."""

    def __init__(self, path, plan, began):
        self._path, self._began, self._limit, self._samples = Path(path), began, plan["seconds"], plan["samples"]
        self.record = {"steps": [], "capacity": [], "throughput": None, "first_token": None, "not_measured": []}

    def save(self, **values):
        self.record |= values
        temporary = self._path.with_suffix(".part")
        temporary.write_text(json.dumps(self.record), encoding="utf-8")
        temporary.replace(self._path)

    def sample(self, what, measure, share=1.0):
        """Return samples of a measurement: as many as there is time for, none if it fails or there is no time.

        Parameters
        ----------
        share : of the samples of a step, taken of what takes long; at least one is.
        """
        samples = []
        wanted = max(1, math.ceil(self._samples * share))
        for _ in range(wanted):
            if time.time() - self._began > 0.9 * self._limit:
                self.record["not_measured"].append(f"{what}: {len(samples)} of {wanted} samples, no time was left")
                break
            try:
                samples.append(measure())
            except Exception as error:  # one cell that fails ends no process
                self.failed(what, error)
                if isinstance(error, NotTogether):
                    raise
                break
        return samples

    def failed(self, what, error):
        """Note why something was not measured."""
        self.record["not_measured"].append(f"{what}: {said(error)}")
