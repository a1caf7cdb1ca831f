"""How properties are tried, and the CUDA backend: tests of it are marked `gpu` and skipped where no device can be opened."""

import os
from importlib.util import find_spec

import pytest
from hypothesis import settings

# They start engines: nox -s vllm.
collect_ignore = [] if find_spec("vllm") else ["vllm_engine"]

# Deterministic unless asked otherwise: the same examples in every run. HYPOTHESIS_PROFILE=nightly or weekly tries others, many
# more; few is for mutants, each of which runs the tests again.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=100)
settings.register_profile("few", derandomize=True, deadline=None, max_examples=20)
settings.register_profile("nightly", deadline=None, max_examples=500, print_blob=True)
settings.register_profile("weekly", deadline=None, max_examples=2500, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def two_gpus():
    """Skip where there are none or one."""
    torch = pytest.importorskip("torch")
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")


@pytest.fixture(scope="session")
def open_cuda():
    """Return a function that opens the backend with forced kernels; skips where there is no device."""
    from elastickv.backends.cuda.device import driver_api
    from elastickv.errors import UsageError

    try:
        driver_api()
    except UsageError as reason:
        pytest.skip(str(reason))
    from elastickv.backends.cuda.backend import CudaBackend

    opened = {}

    def open_(kind="auto", **macros):
        key = (kind, tuple(sorted(macros.items())))
        if key not in opened:
            opened[key] = CudaBackend(None, kind, macros)
        return opened[key]

    return open_
