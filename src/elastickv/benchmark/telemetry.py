"""What the device did while it was measured: clock, power, temperature, throttling, disturbance by others.

A thread reads a probe at a fixed interval; `snapshot` is the last reading, so it costs nothing between two samples.
"""

import threading
import time
from collections import Counter
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol

from elastickv.benchmark.telemetry_probes import NvmlProbe, ProcfsProbe, UnavailableError

INTERVAL_S = 0.25
_JOIN_S = 5.0


class Probe(Protocol):
    """One source of readings."""

    source: str

    def read(self) -> dict[str, Any]:
        """Return one reading as JSON values; `flags` names what looks disturbed."""

    def close(self) -> None:
        """Release what the probe holds."""


def open_probe(kind: str, device: int) -> Probe:
    """Return the probe of a device kind ('cpu' or 'cuda').

    Raises
    ------
    UnavailableError : if nothing can be read here; the message says why.
    """
    return NvmlProbe(device) if kind == "cuda" else ProcfsProbe()


class Telemetry:
    """Log readings from entry to exit; disturbed ones are marked.

    A source that is missing or fails is no error: the record says why there are no readings, or no more.
    """

    def __init__(self, kind: str, device: int = 0, interval_s: float = INTERVAL_S) -> None:
        self._kind, self._device, self._interval_s = kind, device, interval_s
        self._readings: list[dict[str, Any]] = []
        self._probe: Probe | None = None
        self._note: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._start_s = 0.0

    def __enter__(self) -> "Telemetry":
        self._start_s = time.monotonic()
        try:
            self._probe = open_probe(self._kind, self._device)
            self._read()
        except Exception as error:
            self._note = _why(error)
            return self
        self._thread = threading.Thread(target=self._loop, name="telemetry", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_JOIN_S)
        if self._probe is not None:
            with suppress(Exception):  # What is measured by now must not be lost over it.
                self._probe.close()

    def snapshot(self) -> dict[str, Any]:
        """Return the latest reading, at most one interval old; only `flags`, empty, where there is no source."""
        return dict(self._readings[-1]) if self._readings else {"flags": []}

    def flags(self) -> list[str]:
        """Return one line for each kind of disturbance, with how many readings showed it."""
        readings = list(self._readings)
        counts = Counter(flag for reading in readings for flag in reading["flags"])
        return [f"{flag} in {count} of {len(readings)} readings" for flag, count in sorted(counts.items())]

    def record(self) -> dict[str, Any]:
        """Return the log as JSON values: source, interval, why it is missing or ended, all readings and the flags."""
        return {
            "source": self._probe.source if self._probe else None,
            "note": self._note,
            "interval_s": self._interval_s,
            "flags": self.flags(),
            "readings": list(self._readings),
        }

    def _loop(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                self._read()
            except Exception as error:
                self._note = f"readings end early: {_why(error)}"
                return

    def _read(self) -> None:
        if self._probe is not None:
            self._readings.append({"time_s": round(time.monotonic() - self._start_s, 4), **self._probe.read()})


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, UnavailableError) else f"{type(error).__name__}: {error}"
