"""The sources of telemetry: NVML for NVIDIA GPUs, /proc for the processors of a Linux machine."""

import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

# https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html
THROTTLE_REASONS: dict[int, str] = {
    0x001: "idle",
    0x002: "application clocks",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clocks",
}
HARMLESS_REASONS = 0x001 | 0x002
OTHER_LOAD_LIMIT = 0.25
STEAL_LIMIT = 0.01
# CPU times advance in ticks of 10 ms: a share over less than this is mostly rounding.
_MIN_SPAN_S = 0.2
_CPUINFO_BYTES = 16384
_NVML_CLOCK_SM, _NVML_CLOCK_MEM, _NVML_TEMPERATURE_GPU = 1, 2, 0


class UnavailableError(Exception):
    """Nothing can be read here; the message says why."""


class NvmlProbe:
    """Clock, power, temperature and throttle reasons of one GPU, through NVML (package nvidia-ml-py)."""

    source = "nvml"

    def __init__(self, device: int) -> None:
        try:
            self._nvml: Any = import_module("pynvml")
        except ImportError as error:
            raise UnavailableError("no clock or power log: pynvml is not installed (pip install nvidia-ml-py)") from error
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            raise UnavailableError(f"no clock or power log: NVML does not start ({error})") from error
        try:
            self._handle = self._open(device)
        except (self._nvml.NVMLError, ValueError) as error:
            self.close()
            raise UnavailableError(f"no clock or power log: NVML does not find CUDA device {device} ({error})") from error

    def read(self) -> dict[str, Any]:
        """Return MHz, watts, degrees Celsius and throttle reasons; None for what this GPU does not tell."""
        nvml, handle = self._nvml, self._handle
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if reasons is None:
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        milliwatts = self._ask("nvmlDeviceGetPowerUsage", handle)
        sm_mhz = self._ask("nvmlDeviceGetClockInfo", handle, _NVML_CLOCK_SM)
        if reasons is None and milliwatts is None and sm_mhz is None:
            raise UnavailableError(f"NVML reports nothing for this GPU ({nvml.__name__})")
        return {
            "sm_mhz": sm_mhz,
            "memory_mhz": self._ask("nvmlDeviceGetClockInfo", handle, _NVML_CLOCK_MEM),
            "power_w": None if milliwatts is None else milliwatts / 1000,
            "temperature_c": self._ask("nvmlDeviceGetTemperature", handle, _NVML_TEMPERATURE_GPU),
            "throttle_reasons": _reason_names(reasons or 0),
            "flags": [f"GPU throttled: {name}" for name in _reason_names((reasons or 0) & ~HARMLESS_REASONS)],
        }

    def close(self) -> None:
        """Shut NVML down."""
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _open(self, device: int) -> Any:
        # NVML numbers all GPUs; CUDA only the visible ones.
        visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
        if not visible:
            return self._nvml.nvmlDeviceGetHandleByIndex(device)
        if device >= len(visible):
            raise ValueError("CUDA_VISIBLE_DEVICES hides it")
        if visible[device].startswith(("GPU-", "MIG-")):
            return self._nvml.nvmlDeviceGetHandleByUUID(visible[device])
        return self._nvml.nvmlDeviceGetHandleByIndex(int(visible[device]))

    def _ask(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(*arguments)
        except (AttributeError, self._nvml.NVMLError):
            return None


def _reason_names(bits: int) -> list[str]:
    known = [name for bit, name in THROTTLE_REASONS.items() if bits & bit]
    rest = bits & ~sum(THROTTLE_REASONS)
    return known + ([f"reason {rest:#x}"] if rest else [])


@dataclass(frozen=True)
class _Ticks:
    """CPU seconds since boot of the whole machine, and of this process, at one moment."""

    wall_s: float
    busy_s: float
    steal_s: float
    own_s: float


class ProcfsProbe:
    """Clock, load and disturbance of the processors, through /proc; None for what a kernel does not report.

    In a container, /proc/stat may tell of the whole host: other processes' load then includes neighbors', as it should.
    """

    source = "procfs"

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        if not (proc / "stat").exists():
            raise UnavailableError(f"no clock or load log: {sys.platform} has no /proc/stat")
        self._tick_s = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01
        self._before = self._ticks()
        self._shares: tuple[float | None, float | None] = (None, None)

    def read(self) -> dict[str, Any]:
        """Return MHz of the first processors (mean), load, and CPUs busy with or stolen by others since the last reading."""
        other, steal = self._shares_since_last()
        flags = []
        if other is not None and other > OTHER_LOAD_LIMIT:
            flags.append(f"other processes used more than {OTHER_LOAD_LIMIT:g} CPUs")
        if steal is not None and steal > STEAL_LIMIT:
            flags.append(f"the hypervisor took more than {STEAL_LIMIT:g} CPUs")
        return {
            "cpu_mhz": self._mhz(),
            "load_1m": self._load(),
            "other_cpus": None if other is None else round(other, 3),
            "stolen_cpus": None if steal is None else round(steal, 3),
            "involuntary_switches": _involuntary_switches(),
            "flags": flags,
        }

    def close(self) -> None:
        """Nothing is held open."""

    def _shares_since_last(self) -> tuple[float | None, float | None]:
        now, before = self._ticks(), self._before
        if now is None or before is None:
            return None, None
        span_s = now.wall_s - before.wall_s
        if span_s >= _MIN_SPAN_S:
            others_s = (now.busy_s - before.busy_s) - (now.own_s - before.own_s)
            self._shares = max(0.0, others_s / span_s), max(0.0, (now.steal_s - before.steal_s) / span_s)
            self._before = now
        return self._shares

    def _ticks(self) -> _Ticks | None:
        try:
            with (self._proc / "stat").open(encoding="ascii") as file:
                fields = [int(word) for word in file.readline().split()[1:]]
            user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
        except (OSError, ValueError):
            return None
        busy = user + nice + system + irq + softirq
        return _Ticks(time.monotonic(), busy * self._tick_s, steal * self._tick_s, time.process_time())

    def _mhz(self) -> float | None:
        # Only the first processors: the kernel asks each core in turn, which takes milliseconds on a large machine.
        try:
            with (self._proc / "cpuinfo").open("rb", buffering=0) as file:
                lines = (file.read(_CPUINFO_BYTES) or b"").decode("utf-8", "replace").splitlines()
            values = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
        except (OSError, ValueError):
            return None
        return round(sum(values) / len(values), 1) if values else None

    def _load(self) -> float | None:
        try:
            return float((self._proc / "loadavg").read_text(encoding="ascii").split()[0])
        except (OSError, ValueError, IndexError):
            return None


def _involuntary_switches() -> int | None:
    try:
        resource = import_module("resource")  # not on Windows
    except ImportError:
        return None
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)
