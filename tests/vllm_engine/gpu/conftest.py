"""The device of these engines: a GPU, or with ELASTICKV_SERVING_DEVICE=cpu the CPU, to try the tests themselves."""

import os

import pytest


@pytest.fixture(scope="session")
def device():
    torch = pytest.importorskip("torch")
    chosen = os.environ.get("ELASTICKV_SERVING_DEVICE", "cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return chosen


@pytest.fixture(scope="session")
def serve_bf16(serve, device):
    """Return the engine with options, in bfloat16, compiled and with graphs unless they say otherwise."""
    from elastickv.vllm.versions import installed_version, minor_version

    def start(fmt="int4", **options):
        settings = {"dtype": "bfloat16", "enforce_eager": device == "cpu", "async_scheduling": None}
        if device == "cuda":
            settings |= {"attention_backend": "ELASTICKV", "gpu_memory_utilization": 0.2}
            if minor_version(installed_version().version).named_cache_dtypes:
                settings["kv_cache_dtype"] = f"elastickv_{fmt}"
        return serve(fmt, **(settings | options))

    return start


@pytest.fixture(scope="session")
def rounded_rule(rule, weights):
    """Return the plain model of bfloat16 weights, queries, keys and values."""
    import torch

    rounded = {name: tensor.to(torch.bfloat16).float() for name, tensor in weights.items()}
    return lambda recipe="int4", window=64: rule(recipe, window, weights=rounded, rounding="bfloat16")
