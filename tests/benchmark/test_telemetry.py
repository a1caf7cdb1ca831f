"""Telemetry reads what there is, says why there is nothing, and names what was disturbed."""

import json
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from elastickv.benchmark import telemetry, telemetry_probes
from elastickv.benchmark.telemetry import Telemetry
from elastickv.benchmark.telemetry_probes import NvmlProbe, ProcfsProbe, UnavailableError

SW_POWER_CAP, IDLE, APPLICATION_CLOCKS = 0x4, 0x1, 0x2


class FakeNvml(ModuleType):
    """Enough of pynvml to be asked; a missing function is one that an old version lacks."""

    class NVMLError(Exception):
        pass

    def __init__(self, reasons: int = 0, starts: bool = True) -> None:
        super().__init__("pynvml")
        self.reasons, self.starts = reasons, starts
        self.opened: list[Any] = []
        self.is_shut = False

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.starts:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.is_shut = True

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index > 7:
            raise self.NVMLError("Invalid Argument")
        self.opened.append(index)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.opened.append(uuid)
        return uuid

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any) -> int:  # noqa: N802
        return self.reasons

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:  # noqa: N802
        return 350_500

    def nvmlDeviceGetClockInfo(self, handle: Any, domain: int) -> int:  # noqa: N802
        return {1: 1980, 2: 2619}[domain]

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:  # noqa: N802
        raise self.NVMLError("Not Supported")


def install(monkeypatch: pytest.MonkeyPatch, nvml: ModuleType | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


@pytest.fixture(autouse=True)
def _all_devices_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_gpu_reading_holds_clock_power_and_reasons_and_null_for_what_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(SW_POWER_CAP | IDLE))
    assert NvmlProbe(0).read() == {
        "sm_mhz": 1980,
        "memory_mhz": 2619,
        "power_w": 350.5,
        "temperature_c": None,
        "throttle_reasons": ["idle", "software power cap"],
        "flags": ["GPU throttled: software power cap"],
    }


def test_idle_and_application_clocks_are_no_disturbance(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(IDLE | APPLICATION_CLOCKS))
    assert NvmlProbe(0).read()["flags"] == []


def test_an_unknown_reason_is_reported_by_its_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(0x1000))
    assert NvmlProbe(0).read()["flags"] == ["GPU throttled: reason 0x1000"]


@pytest.mark.parametrize(
    ("visible", "device", "opened"), [(None, 1, 1), ("3,5", 1, 5), ("GPU-abc,GPU-def", 1, "GPU-def"), (" 2 ", 0, 2)]
)
def test_the_gpu_is_the_one_that_cuda_numbers_so(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, device: int, opened: int | str
) -> None:
    nvml = FakeNvml()
    install(monkeypatch, nvml)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    NvmlProbe(device)
    assert nvml.opened == [opened]


@pytest.mark.parametrize(
    ("nvml", "device", "expected"),
    [(None, 0, "pip install nvidia-ml-py"), (FakeNvml(starts=False), 0, "Driver Not Loaded"), (FakeNvml(), 9, "device 9")],
)
def test_a_missing_source_is_a_note_and_no_error(
    monkeypatch: pytest.MonkeyPatch, nvml: ModuleType | None, device: int, expected: str
) -> None:
    install(monkeypatch, nvml)
    with Telemetry("cuda", device) as log:
        assert log.snapshot() == {"flags": []}
    record = log.record()
    assert record["source"] is None
    assert expected in record["note"]
    assert record["readings"] == []


def test_the_log_counts_what_was_disturbed_and_releases_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(SW_POWER_CAP)
    install(monkeypatch, nvml)
    with Telemetry("cuda", interval_s=60) as log:
        assert log.snapshot()["sm_mhz"] == 1980
    assert log.flags() == ["GPU throttled: software power cap in 1 of 1 readings"]
    assert json.loads(json.dumps(log.record())) == log.record()
    assert nvml.is_shut


class CountedProbe:
    """Signals its third reading, then has no more."""

    source = "counted"

    def __init__(self) -> None:
        self.count, self.third = 0, threading.Event()

    def read(self) -> dict[str, Any]:
        self.count += 1
        if self.count == 3:
            self.third.set()
        if self.count > 3:
            raise UnavailableError("unplugged")
        return {"count": self.count, "flags": ["odd"] if self.count % 2 else []}

    def close(self) -> None:
        pass


def test_readings_go_on_in_the_background_and_their_end_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = CountedProbe()
    monkeypatch.setattr(telemetry, "open_probe", lambda kind, device: probe)
    with Telemetry("cpu", interval_s=0.001) as log:
        assert probe.third.wait(30)
        assert log._thread is not None
        log._thread.join(30)
    assert [reading["count"] for reading in log.record()["readings"]] == [1, 2, 3]
    assert log.flags() == ["odd in 2 of 3 readings"]
    assert log.record()["note"] == "readings end early: unplugged"


def write_proc(folder: Path, busy_ticks: int, steal_ticks: int) -> None:
    (folder / "stat").write_text(f"cpu  {busy_ticks} 0 0 5000 0 0 0 {steal_ticks} 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\n")
    (folder / "loadavg").write_text("1.25 0.50 0.25 2/100 4242\n")
    (folder / "cpuinfo").write_text("processor\t: 0\ncpu MHz\t\t: 2000.000\n\nprocessor\t: 1\ncpu MHz\t\t: 3000.000\n")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Wall seconds and own CPU seconds, to be moved by the test."""
    now = [0.0, 0.0]
    monkeypatch.setattr(telemetry_probes.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(telemetry_probes.time, "process_time", lambda: now[1])
    monkeypatch.setattr(telemetry_probes.os, "sysconf", lambda name: 100, raising=False)
    return now


def test_other_processes_load_is_what_was_busy_less_what_was_ours(tmp_path: Path, clock: list[float]) -> None:
    write_proc(tmp_path, 1000, 0)
    probe = ProcfsProbe(tmp_path)
    clock[:] = [2.0, 3.0]
    write_proc(tmp_path, 1000 + 400, 10)
    reading = probe.read()
    # 4 s busy, 3 of them ours, over 2 s; 0.1 s stolen over 2 s.
    assert (reading["other_cpus"], reading["stolen_cpus"]) == (0.5, 0.05)
    assert (reading["cpu_mhz"], reading["load_1m"]) == (2500.0, 1.25)
    assert reading["flags"] == ["other processes used more than 0.25 CPUs", "the hypervisor took more than 0.01 CPUs"]


def test_an_undisturbed_processor_has_no_flags(tmp_path: Path, clock: list[float]) -> None:
    write_proc(tmp_path, 1000, 0)
    probe = ProcfsProbe(tmp_path)
    clock[:] = [2.0, 3.9]
    write_proc(tmp_path, 1000 + 400, 0)
    assert probe.read()["flags"] == []


def test_a_share_over_a_few_ticks_is_not_told(tmp_path: Path, clock: list[float]) -> None:
    write_proc(tmp_path, 1000, 0)
    probe = ProcfsProbe(tmp_path)
    clock[:] = [0.05, 0.0]
    write_proc(tmp_path, 1005, 0)
    assert probe.read()["other_cpus"] is None


def test_a_kernel_that_tells_little_gives_nulls(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("nothing known\n")
    reading = ProcfsProbe(tmp_path).read()
    told = {name: reading[name] for name in ("cpu_mhz", "load_1m", "other_cpus", "stolen_cpus", "flags")}
    assert told == {"cpu_mhz": None, "load_1m": None, "other_cpus": None, "stolen_cpus": None, "flags": []}


def test_without_proc_the_log_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="/proc/stat"):
        ProcfsProbe(tmp_path / "absent")
