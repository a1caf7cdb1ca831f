"""What is missing is named with the command that mends it; what is broken is told from what a CPU run does without."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from elastickv import backends
from elastickv.backends import registry
from elastickv.benchmark import doctor, extras
from elastickv.errors import UsageError
from tests.test_architecture import COMMANDS

PYPROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
# As pip writes them into the metadata of an installed package.
REQUIRES = [
    "numpy<3,>=2.0",
    "cuda-bindings<13,>=12.9; extra == 'cuda'",
    "jinja2<4,>=3.1; extra == 'report'",
    "matplotlib<4,>=3.8; extra == 'report'",
    "accelerate<2,>=1.1; extra == 'transformers'",
    "gguf<1,>=0.10; extra == 'transformers'",
    "torch<3,>=2.5; extra == 'transformers'",
    "transformers<6,>=5.17; extra == 'transformers'",
    "tomli<3; python_version < '3.0' and extra == 'report'",
    "pytest<10,>=8; extra == 'test'",
]


@pytest.fixture
def installed(monkeypatch):
    """Make the metadata say that these packages, and ElasticKV with its extras, are installed."""

    def only(versions, requires=REQUIRES):
        names = list(dict.fromkeys(re.findall(r"extra == '(\w+)'", " ".join(requires))))

        def version(name):
            if name not in versions:
                raise extras.metadata.PackageNotFoundError(name)
            return versions[name]

        present = SimpleNamespace(
            PackageNotFoundError=extras.metadata.PackageNotFoundError,
            metadata=lambda name: SimpleNamespace(get_all=lambda field: names),
            requires=lambda name: requires,
            version=version,
        )
        monkeypatch.setattr(extras, "metadata", present)

    return only


@pytest.fixture
def no_compiler(monkeypatch):
    def missing(name):
        raise UsageError('no NVRTC: pip install "elastickv[cuda]"')

    monkeypatch.setattr(doctor, "import_module", missing)


@pytest.fixture
def no_cuda(monkeypatch):
    original = registry._open

    def refuse(name, device, allocator):
        if name == "cuda":
            raise UsageError('the CUDA backend is not installed: pip install "elastickv[cuda]"')
        return original(name, device, allocator)

    monkeypatch.setattr(registry, "_open", refuse)


def test_a_missing_cuda_back_end_is_broken_where_a_gpu_is(no_cuda, monkeypatch):
    monkeypatch.setattr(doctor, "gpu_present", lambda: True)
    found = {finding.topic: finding for finding in doctor.findings()}
    assert found["cuda backend"].state == "broken" and "elastickv[cuda]" in found["cuda backend"].detail
    assert found["cpu backend"].state == "ok"


def test_without_a_gpu_no_install_of_cuda_is_advised(no_cuda, no_compiler, installed, monkeypatch):
    monkeypatch.setattr(doctor, "gpu_present", lambda: False)
    installed({"numpy": "2.1"})
    found = list(doctor.findings())
    assert not [finding for finding in found if finding.state == "broken"]
    assert not [finding for finding in found if "cuda" in finding.remedy or "[cuda" in finding.detail]
    topics = [finding.topic for finding in found]
    assert topics.index("works now") < topics.index("GPU") < topics.index("extra report")
    said = {finding.topic: finding for finding in found}
    assert said["works now"].detail == "bench, sweep, compare, doctor"
    assert "no NVIDIA GPU" in said["GPU"].detail and "nothing needs it" in said["extra cuda"].detail


def test_each_extra_says_what_it_adds_and_how_to_get_it(no_cuda, installed):
    installed({"jinja2": "3.1.6", "matplotlib": "3.7.1", "torch": "2.13.0", "gguf": "0.19.0", "accelerate": "1.2"})
    found = {finding.topic: finding for finding in doctor.findings()}
    report, models = found["extra report"], found["extra transformers"]
    assert (
        "would add report: one page" in report.detail
        and "unsupported: matplotlib 3.7.1, supported is <4,>=3.8" in report.detail
    )
    assert "run, eval, calibrate" in models.detail and "not installed: transformers" in models.detail
    assert (report.state, report.remedy) == ("absent", 'pip install "elastickv[report]"')
    assert "report" not in found["works now"].detail


def test_an_extra_that_is_complete_works_now(no_cuda, installed):
    installed({"jinja2": "3.1.6", "matplotlib": "3.9"})
    found = {finding.topic: finding for finding in doctor.findings()}
    assert found["extra report"].state == "ok" and "jinja2 3.1.6, matplotlib 3.9" in found["extra report"].detail
    assert found["works now"].detail.endswith(", report")


def test_an_extra_that_is_declared_later_is_listed(no_cuda, installed, monkeypatch):
    installed({}, [*REQUIRES, "vllm<2,>=1; extra == 'vllm'"])
    found = {finding.topic: finding for finding in doctor.findings()}
    assert "not installed: vllm" in found["extra vllm"].detail


def test_a_copy_that_is_not_installed_says_so(no_cuda, monkeypatch):
    def unknown(name):
        raise extras.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(extras.metadata, "metadata", unknown)
    found = {finding.topic: finding for finding in doctor.findings()}
    assert found["extras"].remedy == "pip install ." and found["works now"].detail


def test_every_declared_extra_and_every_command_is_described():
    """What pyproject.toml declares: a new extra needs its purpose in `benchmark/extras.py`."""
    declared = re.findall(
        r"^(\w+) = \[", PYPROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.MULTILINE
    )
    assert set(declared) == {*extras.PURPOSES, *extras.FOR_CONTRIBUTORS}
    named = {name.split()[0] for names in (extras.BASE_COMMANDS, *extras.COMMANDS.values()) for name in names}
    assert named == COMMANDS


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
