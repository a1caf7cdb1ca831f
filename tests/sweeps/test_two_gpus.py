"""A sweep over two real GPUs: both measure, and what one lost the other measures."""

from collections import Counter

import pytest

from elastickv.errors import UsageError
from elastickv.sweeps import scheduler
from elastickv.sweeps.sweep import sweep
from tests.sweeps.test_sweep_faults import Watcher

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("two_gpus")]
CELLS = {"seq": [1024, 2048, 4096], "batch": [1, 2], "compress": 2, "heads": 8, "reps": 60, "warmup": 5, "backend": "cuda"}


class Killer(Watcher):
    """Kills the process of GPU 1 in the middle of its second cell."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.begun, self.killed = [], None
        begin = scheduler._Worker.measure

        def measure(worker, cell, request):
            self.begun.append((worker, cell))
            begin(worker, cell, request)

        monkeypatch.setattr(scheduler._Worker, "measure", measure)

    def devices_of(self, cell):
        return [worker.device for worker, begun in self.begun if begun == cell]

    def working(self, cell, phase, share):
        mine = [(worker, begun) for worker, begun in self.begun if worker.device == 1]
        if self.killed is None and share and len(mine) == 2 and mine[1][1] == cell:
            self.killed = cell
            mine[1][0]._process.kill()


def test_both_measure_and_a_cell_whose_process_was_killed_is_measured_by_the_other(tmp_path, monkeypatch):
    watcher = Killer(monkeypatch)
    found = sweep(output=tmp_path / "s.jsonl", devices=[0, 1], watcher=watcher, **CELLS)
    assert found.complete and Counter(cell["status"] for cell in found.cells) == {"ok": 6}
    assert {worker.device for worker, _ in watcher.begun} == {0, 1}
    assert watcher.killed is not None and watcher.devices_of(watcher.killed) == [1, 0]
    assert len(watcher.begun) == 7 and not watcher.out
    for cell in found.cells:
        assert cell["gpu"]["kind"] == "cuda" and cell["fidelity"]["kernel_error"]["elastic"]["max"] < 1e-2


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_measured(tmp_path):
    import torch

    absent = torch.cuda.device_count()
    with pytest.raises(UsageError, match=f"device {absent} does not exist"):
        sweep(output=tmp_path / "s.jsonl", devices=[0, absent], **CELLS)
