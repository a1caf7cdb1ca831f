"""What is missing is named with the command that mends it; what is broken is told from what a CPU run does without."""

import pytest

from elastickv import backends
from elastickv.backends import registry
from elastickv.benchmark import doctor
from elastickv.errors import UsageError


@pytest.fixture
def no_cuda(monkeypatch):
    original = registry._open

    def refuse(name, device, allocator):
        if name == "cuda":
            raise UsageError('the CUDA backend is not installed: pip install "elastickv[cuda]"')
        return original(name, device, allocator)

    monkeypatch.setattr(registry, "_open", refuse)


@pytest.mark.parametrize(("present", "state"), [(True, "broken"), (False, "absent")])
def test_a_missing_cuda_back_end_is_broken_only_where_a_gpu_is(no_cuda, monkeypatch, present, state):
    monkeypatch.setattr(doctor, "gpu_present", lambda: present)
    found = {finding.topic: finding for finding in doctor.findings()}
    assert found["cuda backend"].state == state
    assert "elastickv[cuda]" in found["cuda backend"].detail
    assert found["cpu backend"].state == "ok"


@pytest.mark.parametrize(("present", "said"), [(True, "elastickv[cuda]"), (False, None)])
def test_the_cpu_stands_in_and_says_so_only_where_a_gpu_is(no_cuda, monkeypatch, present, said):
    monkeypatch.setattr(registry, "gpu_present", lambda: present)
    backend, passed_over = backends.load("auto")
    assert backend.name == "cpu"
    assert passed_over is None if said is None else said in passed_over


def test_an_unwritable_kernel_cache_is_named_with_its_remedy(no_cuda, monkeypatch):
    monkeypatch.setattr(doctor, "obstacle", lambda folder: "Read-only file system")
    found = {finding.topic: finding for finding in doctor.findings()}
    assert found["kernel cache"].state == "absent"
    assert "ELASTICKV_CACHE_DIR" in found["kernel cache"].remedy


def test_a_cpu_back_end_that_is_refused_tells_its_own_remedy(monkeypatch):
    def refuse(name, device, allocator):
        raise UsageError("the settings are wrong: mend them")

    monkeypatch.setattr(registry, "_open", refuse)
    found = doctor._cpu_backend()
    assert (found.state, found.detail, found.remedy) == ("broken", "the settings are wrong: mend them", "")
