"""Memory that some work takes, as PyTorch's allocator and the driver tell."""

import pytest
import torch

from elastickv.model_benchmark import memory_estimate
from elastickv.model_benchmark.memory_estimate import Footprint


class Gpu:
    """A device of 1000 bytes whose figures are set by hand."""

    def __init__(self, monkeypatch):
        self.allocated = self.most = self.reserved = self.past = self.emptied = 0
        for name, figure in (
            ("memory_allocated", lambda device: self.allocated),
            ("max_memory_allocated", lambda device: self.most),
            ("memory_reserved", lambda device: self.reserved),
            ("mem_get_info", lambda device: (1000 - self.reserved - self.past, 1000)),
            ("reset_peak_memory_stats", lambda device: setattr(self, "most", self.allocated)),
            ("empty_cache", lambda: setattr(self, "emptied", self.emptied + 1)),
        ):
            monkeypatch.setattr(torch.cuda, name, figure)

    def take(self, allocated, most, reserved, past):
        self.allocated, self.most, self.reserved, self.past = allocated, most, reserved, past


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def test_what_the_driver_gave_past_the_allocator_counts(gpu):
    gpu.take(100, 100, 150, 20)
    work = Footprint(torch.device("cuda"))
    with work.watched():
        gpu.take(130, 300, 350, 60)
    assert (work.held_bytes, work.peak_bytes) == (30 + 40, 200 + 40)
    assert gpu.emptied == 1, "what others freed would be taken again unseen"


def test_what_others_take_in_between_does_not_count(gpu):
    gpu.take(100, 100, 150, 20)
    work = Footprint(torch.device("cuda"))
    with work.watched():
        gpu.take(130, 160, 350, 20)
    gpu.take(500, 900, 950, 30)
    with work.watched():
        gpu.take(540, 560, 950, 30)
    # 30 held, and 60 more at the most of the second stretch.
    assert (work.held_bytes, work.peak_bytes) == (70, 90)


def test_an_exception_is_counted_too(gpu):
    work = Footprint(torch.device("cuda"))

    def fail():
        with work.watched():
            gpu.take(10, 50, 50, 0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (work.held_bytes, work.peak_bytes) == (10, 50)


def test_memory_that_pytorch_keeps_for_reuse_is_free(gpu):
    gpu.take(100, 100, 400, 50)
    assert memory_estimate.free_bytes(torch.device("cuda")) == 1000 - 100 - 50
    assert memory_estimate.past_allocator(torch.device("cuda")) == 50
