"""What is missing is named with the command that mends it; what is broken is told from what a CPU run does without."""

import pytest

from elastickv import backends
from elastickv.backends import registry
from elastickv.benchmark import doctor
from elastickv.errors import UsageError


@pytest.fixture
def no_cuda(monkeypatch):
    original = registry._open

    def refuse(name, device, allocator, report):
        if name == "cuda":
            raise UsageError('the CUDA backend is not installed: pip install "elastickv[cuda]"')
        return original(name, device, allocator, report)

    monkeypatch.setattr(registry, "_open", refuse)


def test_a_missing_cuda_back_end_is_broken_where_a_gpu_is(no_cuda, monkeypatch):
    monkeypatch.setattr(doctor, "gpu_present", lambda: True)
    found = {finding.topic: finding for finding in doctor.findings()}
    assert found["cuda backend"].state == "broken" and "elastickv[cuda]" in found["cuda backend"].detail
    assert found["cpu backend"].state == "ok"


def test_without_a_gpu_no_install_of_cuda_is_advised(no_cuda, monkeypatch):
    def missing(name):
        raise UsageError('no NVRTC: pip install "elastickv[cuda]"')

    monkeypatch.setattr(doctor, "gpu_present", lambda: False)
    monkeypatch.setattr(doctor, "import_module", missing)
    found = list(doctor.findings())
    assert not [finding for finding in found if finding.state == "broken"]
    assert not [finding for finding in found if "cuda" in finding.remedy or "[cuda" in finding.detail]
    assert "no NVIDIA GPU" in {finding.topic: finding.detail for finding in found}["GPU"]


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
    def refuse(name, device, allocator, report):
        raise UsageError("the settings are wrong: mend them")

    monkeypatch.setattr(registry, "_open", refuse)
    found = doctor._cpu_backend()
    assert (found.state, found.detail, found.remedy) == ("broken", "the settings are wrong: mend them", "")
