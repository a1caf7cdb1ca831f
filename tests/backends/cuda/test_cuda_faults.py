"""Programs on a simulated driver that fails: no GPU is needed."""

import gc
from enum import IntEnum
from types import SimpleNamespace

import pytest

from elastickv.backends import registry
from elastickv.backends.cuda.programs import CudaProgram
from elastickv.benchmark import doctor
from elastickv.errors import DeviceFailure, DeviceLost, RanOut, UsageError


class Status(IntEnum):
    """A few of the driver's."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class Driver:
    """Records its calls; `fails` maps a function to the status that it returns, and the number of the first call that fails."""

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, **fails):
        self.calls, self._fails = [], fails

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*_arguments):
            self.calls.append(name)
            status, first = self._fails.get(name, (Status.CUDA_SUCCESS, 1))
            failed = status and self.calls.count(name) >= first
            return (status if failed else Status.CUDA_SUCCESS, (7, 3) if name == "cuGraphGetNodes" else 7)

        return call


def program(driver, queue=lambda: None, graph=True):
    stream = SimpleNamespace(handle=1, sync=lambda: None)
    return CudaProgram(SimpleNamespace(driver=driver, stream=stream), [], [], queue, lambda: None, 0, graph, 1)


@pytest.mark.fault("out of memory")
@pytest.mark.parametrize(
    "fails", [{}, {"cuStreamEndCapture": (Status.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, 1)}], ids=["ends", "broken"]
)
def test_what_broke_a_capture_is_what_is_raised(fails):
    def full():
        raise RanOut("the device's memory ran out")

    driver = Driver(**fails)
    with pytest.raises(RanOut):
        program(driver, full)
    assert driver.calls[-1] == "cuStreamEndCapture" and gc.isenabled()


@pytest.mark.fault("out of memory")
def test_a_graph_that_the_device_has_no_memory_for(capsys):
    driver = Driver(cuGraphInstantiate=(Status.CUDA_ERROR_OUT_OF_MEMORY, 1))
    with pytest.raises(RanOut, match="CUDA_ERROR_OUT_OF_MEMORY"):
        program(driver)
    assert capsys.readouterr().err == ""


@pytest.mark.fault("lost device")
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("status", [Status.CUDA_ERROR_LAUNCH_FAILED, Status.CUDA_ERROR_ILLEGAL_ADDRESS])
def test_a_device_that_is_lost_in_the_middle_of_launches_is_named_and_gives_no_times(graph, status):
    driver = Driver(cuEventRecord=(status, 4))
    running = program(driver, graph=graph)
    with pytest.raises(DeviceLost, match=status.name):
        running.run(3)
    assert driver.calls.count("cuEventDestroy") == driver.calls.count("cuEventCreate") == 6


@pytest.mark.fault("one of several devices fails")
def test_doctor_names_a_device_that_fails_and_goes_on_to_the_next(monkeypatch):
    def load(name, number):
        if number == 2:
            raise UsageError("CUDA device 2 does not exist")
        raise DeviceFailure(f"the CUDA driver failed on {number}")

    monkeypatch.setattr("elastickv.backends.load", load)
    findings = list(doctor._devices("broken", True))
    assert [(finding.topic, finding.state) for finding in findings] == [("GPU 0", "broken"), ("GPU 1", "broken")]


@pytest.mark.fault("lost device")
def test_a_driver_that_fails_while_a_back_end_opens_is_named(monkeypatch):
    error = type("CUDAError", (Exception,), {})("CUDA_ERROR_ECC_UNCORRECTABLE: bad memory")

    def broken(device):
        raise error

    monkeypatch.setattr(registry, "import_module", lambda name: SimpleNamespace(open_backend=broken))
    with pytest.raises(DeviceLost, match="ECC_UNCORRECTABLE"):
        registry.load("cuda")
