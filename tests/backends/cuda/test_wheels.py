"""Messages for missing wheels of CUDA name the extra that fits the PyTorch of the environment."""

import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from elastickv.backends.cuda.wheels import cuda_install_command


@pytest.mark.parametrize(
    ("torch_cuda", "bindings", "extra"),
    [
        ("13.0", None, "cuda13"),  # vLLM's wheels
        ("12.8", None, "cuda"),
        ("13.0", "12.9.1", "cuda13"),
        ("12.8", "13.0.3", "cuda"),
        (None, "13.0.3", "cuda13"),
        (None, "12.9.1", "cuda"),
        (None, None, "cuda"),
    ],
)
def test_the_extra_is_of_the_cuda_that_is_there(monkeypatch, torch_cuda, bindings, extra):
    def version(package):
        if package != "cuda-bindings" or bindings is None:
            raise metadata.PackageNotFoundError
        return bindings

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(version=SimpleNamespace(cuda=torch_cuda)))
    monkeypatch.setattr(metadata, "version", version)
    assert cuda_install_command() == f'pip install "elastickv[{extra}]"'


def test_nothing_is_imported_to_find_out(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert "elastickv[cuda" in cuda_install_command()
    assert "torch" not in sys.modules
