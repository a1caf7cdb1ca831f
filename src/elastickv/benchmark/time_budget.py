"""What of a run still fits into its time limit, which bounds everything: compilation, checks, warm-up, samples."""

import math
import os
import time
from pathlib import Path

from elastickv import backends
from elastickv.backends.gpu_detection import gpu_present
from elastickv.backends.kernel_cache import cache_folder, sources_digest
from elastickv.benchmark.options import Options
from elastickv.benchmark.reporter import Reporter
from elastickv.recipe import dense_bytes

# Orders of magnitude on two cores; they decide on nothing but a line of text.
CHECKS_S = 4.0
COMPILE_S = 8.0
DRAWN_PER_S = 5e7  # random keys and values, quantized
READ_PER_S = 5e9
LEAST_SAMPLES = 12  # of dense and elastic: checks, comparisons, one block


class TimeBudget:
    """A time limit from the beginning of a run to its end, and what was left out to keep it.

    Attributes
    ----------
    limit_s : seconds; None is no limit.
    left_out : what was not measured, or not completely -> why.
    """

    def __init__(self, limit_s: float | None = None, started: float | None = None) -> None:
        """Begin to count, or count from `started`, a reading of `time.monotonic`."""
        self.limit_s, self.left_out = limit_s, dict[str, str]()
        self._start = time.monotonic() if started is None else started

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._start

    def left_s(self, share: float = 1.0) -> float:
        """Return the seconds until this share of the limit is over, at least 0; infinite without a limit."""
        return math.inf if self.limit_s is None else max(0.0, share * self.limit_s - self.elapsed_s)

    def shortage(self, seconds: float, share: float = 1.0) -> str | None:
        """Return why work of about `seconds` does not end before this share of the limit is over; None where it does."""
        left = self.left_s(share)
        if seconds <= left:
            return None
        limit = f"the time limit of {self.limit_s:g} s leaves {seconds_text(left)} s for it"
        return f"it takes about {seconds_text(seconds)} s, and {limit}"

    def has_room(self, what: str, seconds: float, share: float = 1.0) -> bool:
        """Whether work of about `seconds` ends before this share of the limit is over; if not, note what is left out."""
        reason = self.shortage(seconds, share)
        if reason is not None:
            self.left_out[what] = reason
        return reason is None


def seconds_text(seconds: float) -> str:
    """Return a number of seconds as messages write it: two digits of a small one, a whole number from ten on."""
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


class TimedPhases:
    """A reporter that passes everything on, and notes how long each phase took.

    Attributes
    ----------
    seconds : phase -> its seconds, of those that have ended.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter, self.seconds = reporter, dict[str, float]()
        self._name, self._start = "", time.monotonic()

    @property
    def name(self) -> str:
        """The phase that has begun last; '' after its end."""
        return self._name

    def phase(self, name: str, note: str = "") -> None:
        """Begin a phase; `note` is shown after its name."""
        self.end()
        self._name = name
        self._reporter.phase(name + note)

    def progress(self, done: int, total: int) -> None:
        """Pass on."""
        self._reporter.progress(done, total)

    def end(self) -> None:
        """End the last phase."""
        now = time.monotonic()
        if self._name:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._start
        self._name, self._start = "", now


def opening(options: Options) -> str:
    """Return what the first line of a run says about its time limit: nothing without one."""
    if options.time_limit_s is None:
        return ""
    slowdown = _slowdown()
    parts = {name: seconds * slowdown for name, seconds in least_seconds(options).items()}
    least = sum(parts.values())
    if least <= options.time_limit_s:
        return f"; the run ends within about {options.time_limit_s:g} s, unless kernels must be compiled first"
    causes = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items() if seconds >= 1)
    if slowdown > 1:
        causes += f"; other processes make everything about {slowdown:.1f} times as slow"
    return f"; the time limit of {options.time_limit_s:g} s is short: the run takes about {least:.0f} s at least ({causes})"


def least_seconds(options: Options) -> dict[str, float]:
    """Return what a run on a CPU cannot leave out -> about its seconds; on CUDA the checks only."""
    parts = {"checks": CHECKS_S}
    if options.backend == "cuda" or (options.backend == "auto" and (options.device is not None or gpu_present())):
        return parts
    if not _compiled():
        parts["compiling the kernels, once"] = COMPILE_S
    dense = dense_bytes([options.seq] * options.batch, options.shape)
    copies = 1 + options.resolved_recipe.anchor_every
    parts["random keys and values"] = dense / 2 * copies / DRAWN_PER_S
    parts["samples"] = LEAST_SAMPLES * max(options.inner_loops, copies) * dense / READ_PER_S
    return parts


def _slowdown() -> float:
    """Return about how many times as long everything takes because of other processes; 1 where the system does not say."""
    if not hasattr(os, "getloadavg"):  # Windows
        return 1.0
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def _compiled() -> bool:
    """Whether this version's CPU kernels have been compiled on this machine."""
    sources = Path(backends.__file__).parent / "cpu"
    return any((cache_folder("numba") / sources_digest(sources)).rglob("*.kernel"))
