"""Which of the extras `cuda` and `cuda13` belongs into this environment: the two exclude each other."""

import sys
from importlib import metadata


def cuda_install_command() -> str:
    """Return the command that installs the wheels of CUDA.

    They are of the CUDA release of PyTorch where it is loaded, as in vLLM, else of an installed `cuda-bindings`, else of the
    release that supports the most GPUs.
    """
    version = getattr(getattr(sys.modules.get("torch"), "version", None), "cuda", None)
    if version is None:
        try:
            version = metadata.version("cuda-bindings")
        except metadata.PackageNotFoundError:
            version = ""
    return f'pip install "elastickv[{"cuda13" if version.startswith("13.") else "cuda"}]"'
