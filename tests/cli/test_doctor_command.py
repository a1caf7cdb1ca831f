"""`elastickv doctor` says what works now, then what each extra would add, from what the package's metadata declares."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from elastickv.cli import extras
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


def findings(can_measure=True):
    declared = extras.declared_extras()
    shown = [extras.commands_that_work(declared, can_measure), *extras.extra_findings(declared)]
    return {finding.topic: finding for finding in shown}


def test_without_a_gpu_an_extra_for_gpus_is_not_missed(installed, monkeypatch):
    installed({})
    monkeypatch.setattr(extras, "gpu_present", lambda: False)
    cuda = findings()["extra cuda"]
    assert "no use for it" in cuda.detail and (cuda.state, cuda.remedy) == ("absent", "")


def test_nothing_that_measures_works_without_a_backend(installed):
    installed({})
    assert findings()["works now"].detail == "bench, sweep, compare, doctor"
    assert findings(can_measure=False)["works now"].detail == "compare, doctor"


def test_the_command_shows_what_works_before_the_extras(elastickv):
    done = elastickv("doctor", "--no-ceilings")
    topics = [line[4:].partition(":")[0] for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert (
        topics.index("cpu backend") < topics.index("works now") < min(topics.index(t) for t in topics if t.startswith("extra"))
    )


def test_each_extra_says_what_it_adds_and_how_to_get_it(installed):
    installed({"jinja2": "3.1.6", "matplotlib": "3.7.1", "torch": "2.13.0", "gguf": "0.19.0", "accelerate": "1.2"})
    found = findings()
    report, models = found["extra report"], found["extra transformers"]
    assert (
        "would add report: one page" in report.detail
        and "unsupported: matplotlib 3.7.1, supported is <4,>=3.8" in report.detail
    )
    assert "run, eval, calibrate" in models.detail and "not installed: transformers" in models.detail
    assert (report.state, report.remedy) == ("absent", 'pip install "elastickv[report]"')
    assert "report" not in found["works now"].detail


def test_an_extra_that_is_complete_works_now(installed):
    installed({"jinja2": "3.1.6", "matplotlib": "3.9"})
    found = findings()
    assert found["extra report"].state == "ok" and "jinja2 3.1.6, matplotlib 3.9" in found["extra report"].detail
    assert found["works now"].detail.endswith(", report")


def test_an_extra_that_is_declared_later_is_listed(installed):
    installed({}, [*REQUIRES, "sglang<2,>=1; extra == 'sglang'"])
    found = findings()
    assert "not installed: sglang" in found["extra sglang"].detail


def test_an_extra_that_requires_nothing_on_this_machine_does_not_work_here(installed):
    installed({"vllm": "0.33.0"}, ["vllm<0.34,>=0.32; sys_platform == 'none' and extra == 'vllm'"])
    assert findings()["extra vllm"].state == "absent"


def test_a_copy_that_is_not_installed_says_so(monkeypatch):
    def unknown(name):
        raise extras.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(extras.metadata, "metadata", unknown)
    found = findings()
    assert found["extras"].remedy == "pip install ." and found["works now"].detail


def test_every_declared_extra_and_every_command_is_described():
    """What pyproject.toml declares: a new extra needs its purpose in `cli/extras.py`."""
    declared = re.findall(
        r"^(\w+) = \[", PYPROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.MULTILINE
    )
    assert set(declared) == {*extras.PURPOSES, *extras.FOR_CONTRIBUTORS}
    named = {name.split()[0] for names in (extras.BASE_COMMANDS, *extras.COMMANDS.values()) for name in names}
    assert named == COMMANDS
