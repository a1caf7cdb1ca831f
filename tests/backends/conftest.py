"""Every backend in turn, for what is to hold on all of them."""

import pytest

from tests.helpers.kinds import KINDS, opened


@pytest.fixture(scope="session", params=[pytest.param(k, marks=[pytest.mark.gpu] * k.startswith("cuda")) for k in KINDS])
def each(request):
    """Return a `Kind`: the reference, the CPU, and CUDA with the kernels of either family."""
    return opened(request.param, request)
